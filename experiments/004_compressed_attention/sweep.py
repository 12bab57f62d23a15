"""Window + CSA + HCA against full attention, equal parameters, at two lengths of equal tokens."""

CONFIG = "configs/train_small.py"
LONG = {"stages.0.length": 2048, "stages.0.batch": 1}
RUNS = {
    "csa_hca_512": {},
    "full_512": {"config": "full.py"},
    "csa_hca_2048": LONG,
    "full_2048": {"config": "full.py"} | LONG,
}
SEEDS = (0, 1, 2)
