"""How many numbers one scale covers (architecture section 10). No JAX here."""

FP8 = 128  # rows and columns of a weight, channels of an activation
FP4 = 32  # input channels of a weight, channels of index queries and keys
KV = 64  # channels of a kv row
