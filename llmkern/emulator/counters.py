"""What launches did, added up: by kind of instruction, by source line, by PTX line.

Warp instructions count once however many lanes are on, also when the guard turns all off. Sectors
are the 32-byte pieces of global memory that a warp's access touches, at best ceil(distinct bytes /
32). Wavefronts are the passes over the banks of shared memory, at best ceil(distinct words / 32)
for each phase of an access (half a warp for 8 bytes a lane, a quarter for 16).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass
class Sums:
    """Counts of a set of instructions."""

    instructions: int = 0
    lanes: int = 0
    bytes: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    def add(self, other: "Sums") -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    @property
    def coalescing(self) -> float:
        """Ideal sectors over touched ones; 1 is perfect."""
        return self.ideal_sectors / self.sectors if self.sectors else 1.0

    @property
    def conflicts(self) -> float:
        """Wavefronts over ideal ones; 1 is free of bank conflicts."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0

    @property
    def active(self) -> float:
        """Mean share of the 32 lanes that were on."""
        return self.lanes / (32 * self.instructions) if self.instructions else 1.0


@dataclass
class Counters:
    """Totals, and the same by class, source line and (PTX line, text)."""

    launches: int = 0
    total: Sums = field(default_factory=Sums)
    by_class: dict[str, Sums] = field(default_factory=dict)
    by_source: dict[str, Sums] = field(default_factory=dict)
    by_line: dict[tuple[int, str], Sums] = field(default_factory=dict)

    def add_launches(self, launches: int, rows: Iterable[tuple]) -> None:
        """Rows of Program.rows(), of so many launches together."""
        self.launches += launches
        for kind, line, text, source, *counts in rows:
            sums = Sums(*counts)
            self.total.add(sums)
            self.by_class.setdefault(kind, Sums()).add(sums)
            self.by_source.setdefault(source, Sums()).add(sums)
            self.by_line.setdefault((line, text), Sums()).add(sums)

    def add(self, other: "Counters") -> None:
        """Count what another one counted."""
        self.launches += other.launches
        self.total.add(other.total)
        for name in ("by_class", "by_source", "by_line"):
            mine = getattr(self, name)
            for key, sums in getattr(other, name).items():
                mine.setdefault(key, Sums()).add(sums)

    @property
    def warp_instructions(self) -> int:
        return self.total.instructions

    @property
    def mma(self) -> int:
        """mma instructions of all shapes."""
        return self.by_class.get("mma", Sums()).instructions

    @property
    def global_bytes(self) -> int:
        """Bytes moved to and from global memory, whole sectors."""
        return 32 * self.total.sectors

    def table(self, sources: int = 10) -> str:
        """A text: classes, then the source lines that ran most."""
        head = f"{'':32}{'warp instr.':>12}{'active':>8}{'sectors':>10}{'coalesced':>10}"
        head += f"{'wavefronts':>12}{'conflicts':>10}"
        lines = [head]
        ordered = sorted(self.by_class.items(), key=lambda kv: -kv[1].instructions)
        lines += [_row(name, sums) for name, sums in ordered]
        lines.append(_row("total", self.total))
        busiest = sorted(self.by_source.items(), key=lambda kv: -kv[1].instructions)[:sources]
        lines += [_row(name[-31:] or "(no source)", sums) for name, sums in busiest]
        return "\n".join(lines)


def _row(name: str, s: Sums) -> str:
    text = f"{name:32}{s.instructions:>12}{s.active:>8.0%}{s.sectors:>10}"
    text += f"{s.coalescing:>10.0%}" if s.sectors else f"{'':>10}"
    text += f"{s.wavefronts:>12}"
    return text + (f"{s.conflicts:>10.2f}" if s.ideal_wavefronts else "")
