"""How a test's programs are compiled where conftest.py's flags will not do."""

# As they run elsewhere: programs that LLVM leaves unoptimised, as conftest.py has them, round more
# often; sums of this size are then off by up to 3e-5 themselves.
OPTIMIZED = {"xla_backend_optimization_level": 3}
