"""The text form of what `v4jax inspect` found out."""

from typing import Any

from v4jax.config import ModelConfig, segments
from v4jax.tables import parameters, percent, short, table, tenths

DTYPES = {
    "I8": "I8 (FP4, two a byte)",
    "F8_E4M3": "F8_E4M3",
    "F8_E8M0": "F8_E8M0 (scales)",
    "I64": "I64 (hash tables)",
}


def as_text(config: ModelConfig, report: dict[str, Any]) -> str:
    """The report of `inspect.describe`, as tables."""
    parts = [_title(config, report), _layers(config, report), _stored(report)]
    parts += [_cache(report), _flops(report)]
    if report.get("notes"):
        parts.append("\n".join(["Notes", *(f"  {note}" for note in report["notes"])]))
    if "findings" in report:
        parts.append(_findings(report))
    return "\n\n".join(parts)


def _title(c, report):
    count = report["parameters"]
    return "\n".join(
        [
            f"{report['name']}: {parameters(count['total'])} parameters, "
            f"{parameters(count['active'])} active a token",
            f"  {c.num_hidden_layers} layers of width {c.hidden_size}, {c.hc_mult} residual "
            f"streams, vocabulary {c.vocab_size:,}, {c.max_position_embeddings:,} positions",
            f"  {c.num_attention_heads} heads of {c.head_dim} ({c.qk_rope_head_dim} rotary), "
            f"{c.n_routed_experts} experts of {c.moe_intermediate_size}, {c.num_experts_per_tok} "
            f"a token, {c.n_shared_experts} shared",
        ]
    )


def _layers(config, report):
    header = ("layers", "attention", "routing", "number", "parameters", "active", "KV bytes/token")
    rows = [
        _layer_row(config, label, [report["layers"][i] for i in members])
        for label, members in _runs(config)
    ]
    rows.append(_outside_row(report))
    window = f"window {config.sliding_window}"
    for k, count in enumerate(report["parameters"]["mtp"]):
        rows.append((f"mtp {k}", window, "score", "1", parameters(count), "", ""))
    for k, count in enumerate(report["parameters"]["draft"]):
        rows.append((f"draft {k}", window, "score", "1", parameters(count), "", ""))
    if config.draft_layers and config.dspark is None:
        drafts = str(config.draft_layers)
        rows.append(("drafts", "carried along, never run", "", drafts, "", "", ""))
    return "Layers\n" + table(header, rows, left=3)


def _outside_row(report):
    def outside(name):
        return report["parameters"][name]

    total = outside("total") - sum(layer["parameters"] for layer in report["layers"])
    active = outside("active") - sum(layer["active_parameters"] for layer in report["layers"])
    return ("embed, head", "", "", "", parameters(total), parameters(active), "")


def _layer_row(config, label, layers):
    first = layers[0]
    return (
        label,
        _attention(config, first),
        first["routing"],
        str(len(layers)),
        parameters(sum(layer["parameters"] for layer in layers)),
        parameters(sum(layer["active_parameters"] for layer in layers)),
        tenths(sum(layer["kv_bytes_per_token"] for layer in layers)),
    )


def _attention(config, layer):
    kind = layer["attention"]
    if kind == "window":
        return f"window {config.sliding_window}"
    if kind == "full":
        return "full"
    words = [f"{kind} {layer['ratio']}"]
    if kind == "csa":
        words.append(f"top {config.index_topk}" if config.index_topk else "all entries")
    if layer["overlap"] != (kind == "csa"):
        words.append("overlap" if layer["overlap"] else "no overlap")
    return ", ".join(words)


def _runs(config):
    """Layers that are equal and evenly spaced: ("3, 5 .. 41", [3, 5, ..., 41])."""
    for segment in segments(config.layers, min_repeats=2):
        stop = segment.start + segment.period * segment.repeats
        for first in range(segment.start, segment.start + segment.period):
            members = list(range(first, stop, segment.period))
            yield _range(members, segment.period), members


def _range(members, step):
    if len(members) == 1:
        return str(members[0])
    if step == 1:
        return f"{members[0]}-{members[-1]}"
    dots = " .. " if len(members) > 2 else ", "
    middle = f", {members[1]}" if len(members) > 2 else ""
    return f"{members[0]}{middle}{dots}{members[-1]}"


def _stored(report):
    stored = report["stored"]
    total = sum(entry["bytes"] for entry in stored.values())
    rows = [
        (
            DTYPES.get(dtype, dtype),
            f"{entry['tensors']:,}",
            f"{entry['bytes']:,}",
            f"{100 * entry['bytes'] / total:.1f} %",
        )
        for dtype, entry in sorted(stored.items(), key=lambda item: -item[1]["bytes"])
    ]
    rows.append(("all", f"{report['tensors']:,}", f"{total:,}", ""))
    where = f" in {report['files']:,} files" if report.get("files") else ""
    return f"Stored: {short(total)}B{where}\n" + table(("type", "tensors", "bytes", "share"), rows)


def _cache(report):
    ours, theirs = report["kv_bytes_per_token"], report["v32_kv_bytes_per_token"]
    against = f"{theirs / ours:.3g}x less than V3.2's" if ours else "against V3.2's"
    title = (
        f"KV cache: {tenths(ours)} bytes a token, {against} {theirs:.0f}; "
        f"{short(report['window_bytes'])}B of windows a sequence"
    )
    rows = [
        (
            f"{entry['context']:,}",
            f"{short(entry['kv_bytes'])}B",
            f"{short(entry['v32_kv_bytes'])}B",
            percent(entry["kv_bytes"] / entry["v32_kv_bytes"]),
        )
        for entry in report["contexts"]
    ]
    return f"{title}\n{table(('context', 'cache', 'V3.2', 'of V3.2'), rows, left=0)}"


def _flops(report):
    names = list(report["contexts"][0]["flops_parts"])
    largest = max(entry["flops"] for entry in report["contexts"])
    unit, letter = (1e9, "GFLOPs") if largest >= 1e9 else (1e6, "MFLOPs")
    rows = [
        (
            f"{entry['context']:,}",
            tenths(entry["flops"] / unit),
            tenths(entry["v32_flops"] / unit),
            percent(entry["flops_ratio"]),
            *(tenths(entry["flops_parts"][name] / unit) for name in names),
        )
        for entry in report["contexts"]
    ]
    header = ("context", "total", "V3.2", "of V3.2", *names)
    return f"A decoded token, in {letter} (FP8 equivalents)\n{table(header, rows, left=0)}"


def _findings(report):
    findings = report["findings"]
    if not findings:
        return f"Check: all {report['tensors']:,} tensors are there, and every value is finite"
    lines = [f"Check: {len(findings):,} found", *(f"  {finding}" for finding in findings)]
    return "\n".join(lines)
