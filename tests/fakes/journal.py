"""What happened in a build, in its order: every fake of a port writes into one list."""

from dataclasses import dataclass, field


@dataclass
class Journal:
    """Events as short texts, such as `stage merge`, `job merge`, `push app:1`, `stop`."""

    events: list[str] = field(default_factory=list)
    faults: dict[str, BaseException] = field(default_factory=dict)
    """Event -> what is raised where it would happen; used up by the first such event."""

    def add(self, event: str) -> None:
        """Write an event down, and raise what a test put there."""
        self.events.append(event)
        if event in self.faults:
            raise self.faults.pop(event)

    def of(self, *kinds: str) -> list[str]:
        return [event for event in self.events if event.partition(" ")[0] in kinds]

    def after(self, event: str) -> list[str]:
        return self.events[self.events.index(event) + 1 :]


@dataclass
class RecordingProgress:
    lines: list[tuple[str, ...]] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)
    warnings: list[str] = field(default_factory=list)

    @property
    def said(self) -> list[str]:
        return [line[1] for line in self.lines if line[0] in ("note", "warn")]

    def stage(self, name: str, detail: str) -> None:
        self.lines.append(("stage", name, detail))
        self.journal.add(f"stage {name}")

    def advance(self, done: int, total: int, unit: str) -> None:
        self.lines.append(("advance", str(done), str(total), unit))

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        self.lines.append(("finish", name))
        self.journal.add(f"finish {name}")

    def note(self, text: str) -> None:
        self.lines.append(("note", text))

    def warn(self, text: str) -> None:
        self.lines.append(("warn", text))
        self.warnings.append(text)
