"""Named shapes: small odd ones for numerics, the released models' for compilation and timing."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """Streams [batch, length, streams, channels]."""

    name: str
    batch: int
    length: int
    streams: int
    channels: int
    iterations: int = 20
    eps: float = 1e-6
    rms_eps: float = 1e-6

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.streams, self.channels

    @property
    def rows(self) -> int:
        return (2 + self.streams) * self.streams

    @property
    def options(self) -> dict[str, int | float]:
        return {"iterations": self.iterations, "eps": self.eps, "rms_eps": self.rms_eps}


ODD = Case("odd", 2, 5, 4, 20)
MANY_TILES = Case("two_streams_many_tiles", 1, 300, 2, 20)
EIGHT = Case("eight_streams", 1, 3, 8, 16, iterations=3)
NUMERICS = (
    ODD,
    MANY_TILES,
    EIGHT,
    Case("one_token_one_round", 1, 1, 4, 48, iterations=1),
    Case("one_stream", 1, 3, 1, 32),
)
FLASH = Case("flash", 1, 4096, 4, 4096)
PRO = Case("pro", 1, 4096, 4, 7168)
REAL = (FLASH, PRO)
DECODE = (Case("flash_decode", 64, 1, 4, 4096), Case("pro_decode", 64, 1, 4, 7168))
WIDE = Case("flash_eight_streams", 1, 4096, 8, 4096)
