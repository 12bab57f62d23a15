"""Cases that wait for tools/run_slow_tests.sh: further ones of what a quick case covers already.

The quick suite should take 25 minutes on two cores, and nearly all of that is compiling. Each line
is a regular expression on a test's id; `conftest.py` gives what it finds the slow marker.
"""

import re

SLOW = (
    # Every kind of layer is in "released"; the scanned model's other tests stay.
    r"test_consistency.py::test_any_chunking\[(8-sizes0-ablated|130-sizes1-scanned)",
    r"test_consistency.py::test_any_chunking\[(8-sizes0-all_visible|130-sizes1-released)",
    r"test_consistency.py::test_no_gradient_from_later_tokens\[(scanned|all_visible)",
    # Of the Pallas kernels: several tiles, both ways to chosen entries, nothing to see, one query.
    r"test_sparse_attention.py::test_forward_and_gradients\[pallas_\w+-(all_entries_chosen|"
    r"equal_scores|every_entry|few_older_rows|many_heads|no_window|one_entry|window_with_older)",
    r"test_sparse_attention.py::test_a_packed_choice_is_the_listed_one\[\w+-(chosen_masked|one_qu)",
    r"test_sparse_attention.py::test_bf16_is_as_near_as_bf16_can_be\[\w+-(every_entry|chosen_gat)",
    r"test_grouped_matmul.py::test_stored_weights_equal_their_expansion\[(empty_groups|.*float_sc)",
    r"test_grouped_matmul.py::test_native_rounding_equals_plain_xla\[fp4",
    r"test_grouped_matmul.py::test_sizes_that_no_tile_divides\[32",
    r"test_hyper_connections.py::test_float32\[(post-|pre-many|post_pre-(one_token|eight|two))",
    r"test_hyper_connections.py::test_bfloat16\[(pre|post)-",
    r"test_stored_index_keys.py::test_the_choice_is_that_of_\w+\[\w+-(few_entries|odd_heads)",
    r"test_stored_rows.py::test_in_bf16_they_give_what_the_rows_give\[\w+-chosen_masked",
    r"test_membership.py::test_indices_and_back\[(0.0|1.0)-(31|128|129|4096)\]",
    r"test_aot_sparse_attention.py::test_backward_compiles_for_tpus\[(v6e|v5p-flash_csa_prefill_4k]|"
    r"v5p-pro)",
    r"test_aot_sparse_attention.py::test_forward_compiles_for_tpus\[(v6e|v5p-flash_csa_prefill_4k\])",
    r"test_aot_sparse_attention.py::test_cached_entries_compile_for_tpus\[.*4k_of_64k-lanes",
    r"test_aot_hyper_connections.py::test_\w+(_other_shapes|_decode)",
    r"test_aot_hyper_connections.py::test_tpu\[v5p-(pre|post)-flash",
    r"test_aot_hyper_connections.py::test_h100\[\w+-(pre|post)\]",
    r"test_aot_grouped_matmul.py::test_tpu_\w+\[.*-v6e",
    r"test_aot_indexer_topk.py::test_\w+\[v5p-(\w+_prefill_4k|pro_decode_1m|pro_prefill_64k)",
    # Logits are compared in every config; caches in those that differ most.
    r"test_transformers.py::test_greedy_generation_with_cache\[(csa_only|hca_only|many_experts|"
    r"two_streams|windows|yarn)",
    r"test_released_sizes.py::test_prefill_and_decode_lower\[pro",
    r"test_golden.py::test_native_decode_equals_prefill_choices",
    r"contracts/test_kernels.py::test_(chunks_and_decode\[pallas_gpu|prefill)",
    r"test_loss.py::test_parts_of_a_batch_add_up\[True",
    r"train/test_step.py::test_the_gradient_is_clipped_to_its_global_norm",
    r"test_cli_plan.py::test_a_training_step",
    r"test_processes.py::test_conversion\[4",
    r"test_processes.py::test_a_killed_process_stops_the_others\[(0-sleep|1-compute)",
    r"test_processes.py::test_each_reads_its_part\[4-train",
    r"test_aot_expert.py::test_(tpu|h100)\[1-None",
    r"test_expert.py::test_(waves\[(decode-3|train-2)|stored_experts_stay_stored\[\w+-fp8)",
)
_SLOW = re.compile("|".join(SLOW))


def is_slow(nodeid: str) -> bool:
    """Whether a test case is one of SLOW."""
    return _SLOW.search(nodeid) is not None
