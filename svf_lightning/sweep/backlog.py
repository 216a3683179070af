"""What is left to do, in parts; a part whose process dies is cut until the trial that kills it is alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from svf_lightning.sweep.trial import Trial

Cohort = Sequence[Trial]


class Backlog:
    """Cohorts that wait for a process.

    A process that dies may have had too little memory: from then on, no cohort takes as much as the one that it had.
    If it turns out that one trial kills its process whatever is beside it, that holds no more.

    Args:
        cohorts: What to do, in this order.
        memory: What a trial takes [bytes].
    """

    def __init__(self, cohorts: Iterable[Cohort], *, memory: Callable[[Trial], float]) -> None:
        self._waiting: deque[Cohort] = deque(cohorts)
        self._alone: deque[Cohort] = deque()  # trials whose process died, for whatever reason
        self._memory, self._memories = memory, dict[str, float]()
        self._killed: list[Cohort] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._alone)

    @property
    def largest(self) -> float:
        """What a cohort may take [bytes], as far as is known."""
        return min((max(map(self._memory_of, _halves(cohort))) for cohort in self._killed), default=float("inf"))

    def take(self, *, running: int) -> Cohort | None:
        """The next cohort; None while there is nothing that may begin.

        Args:
            running: How many are being worked on.
        """
        if not self._waiting:
            # with nothing beside it, so that it is not the neighbour's memory that was missing
            return self._alone.popleft() if self._alone and not running else None
        cohort = self._waiting.popleft()
        while self._killed and len(cohort) > 1 and self._memory_of(cohort) > self.largest:
            cohort, rest = _halves(cohort)
            self._waiting.appendleft(rest)
        return cohort

    def put_back(self, cohort: Cohort) -> None:
        """A cohort that was not begun."""
        self._waiting.appendleft(cohort)

    def split(self, cohort: Cohort) -> None:
        """A cohort that failed as a whole: its trials one by one, so that a trial fails alone."""
        self._waiting.extendleft([trial] for trial in reversed(cohort))

    def died(self, cohort: Cohort, *, sure: bool) -> bool:
        """A cohort whose process died.

        Args:
            cohort: What was not done yet.
            sure: Nothing else can have been the cause, such as what ran beside it.

        Returns:
            True if it is one trial, which is to blame; what is not is tried again.
        """
        if len(cohort) > 1:
            self._killed.append(cohort)
            self._waiting.extendleft(reversed(_halves(cohort)))
            return False
        (trial,) = cohort
        self._killed = [killed for killed in self._killed if trial not in killed]
        if not sure:
            self._alone.append(cohort)
        return sure

    def _memory_of(self, cohort: Cohort) -> float:
        for trial in cohort:
            if trial.id not in self._memories:
                self._memories[trial.id] = self._memory(trial)
        return sum(self._memories[trial.id] for trial in cohort)


def _halves(cohort: Cohort) -> tuple[Cohort, Cohort]:
    middle = (len(cohort) + 1) // 2
    return cohort[:middle], cohort[middle:]
