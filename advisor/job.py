"""What the trainers of one training share: its inputs, its folder, and what became of it so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_advisor.advisor.journal import Journal
from lora_advisor.advisor.outcome import Progress
from lora_advisor.advisor.preparing import Data
from lora_advisor.advisor.recovery import Recovery
from lora_advisor.advisor.run_folder import RunFolder
from lora_advisor.advisor.schedule import Settings
from lora_advisor.advisor.stopping import Stopper
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.meter import Meter


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that the trainers of a training share; as in `training.train`."""

    config: RunConfig
    architecture: Architecture
    ready: Data
    settings: Settings
    run: RunFolder
    device: str
    meter: Meter
    journal: Journal
    stopper: Stopper
    progress: Callable[[Progress], None]
    say: Callable[[str], None]
    stop_on_overfit: bool
    tensorboard: bool

    @property
    def recoveries(self) -> list[Recovery]:
        """Where memory ran out so far, in earlier processes too."""
        return [Recovery.from_json(at) for at in self.run.state.get("recoveries", ())]

    @property
    def config_now(self) -> RunConfig:
        """The configuration with the micro-batch that memory has left."""
        of_steps = [at for at in self.recoveries if at.what == "training"]
        if not of_steps:
            return self.config
        last = of_steps[-1]
        return self.config.replace(
            micro_batch=last.new_micro_batch, accumulation=last.new_accumulation
        )

    @property
    def eval_batch_now(self) -> int | None:
        """The evaluation batch, likewise; None for the micro-batch."""
        of_evaluation = [at for at in self.recoveries if at.what == "evaluation"]
        return of_evaluation[-1].new_micro_batch if of_evaluation else self.settings.eval_batch

    @property
    def known_rows(self) -> set[int]:
        """Numbers of the training rows that are left out."""
        known = self.run.state.get("known")
        return set(known["flagged"]) if known and self.settings.drop_known else set()

    def note(self, event: str, text: str) -> None:
        """Tell people and programs that something has happened."""
        self.journal.note(event, text)
        self.say(text)

    def recovered(self, recovery: Recovery) -> None:
        """Remember, and tell, that memory ran out."""
        self.run.keep(recoveries=[at.to_json() for at in (*self.recoveries, recovery)])
        self.note("recovery", str(recovery))
