"""The training loop. What happens around a step, and is not the step, is a callback."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.config import RunConfig
from megatron_ext.data.held_out import HeldOut
from megatron_ext.models.rope import set_rotary_base
from megatron_ext.optim.build import reset_moments, set_learning_rate
from megatron_ext.optim.growth import PlateauState
from megatron_ext.optim.schedule import learning_rate
from megatron_ext.parallel.env import Env
from megatron_ext.resilience import lease
from megatron_ext.resilience.stop import StopRequest
from megatron_ext.train.callback import Callback, Metrics
from megatron_ext.train.elsewhere import Elsewhere
from megatron_ext.train.feed import Feed
from megatron_ext.train.numerics import Numerics
from megatron_ext.train.phases import Phase, Plan
from megatron_ext.train.saving import Checkpoints, numbering
from megatron_ext.train.state import TrainState
from megatron_ext.train.step import StepResult, train_step


class Trainer:
    """Takes a run from where its state stands to its end, or to a request to stop."""

    def __init__(
        self,
        run: RunConfig,
        *,
        plan: Plan,
        env: Env,
        groups: ProcessGroupCollection,
        model: list[Any],
        optimizer: Any,
        feed: Feed,
        validation: dict[str, HeldOut],
        checkpoints: Checkpoints,
        callbacks: list[Callback],
        stop: StopRequest,
    ):
        self.run, self.plan, self.env, self.groups = run, plan, env, groups
        self.model, self.optimizer, self.feed = model, optimizer, feed
        self.validation = validation
        self.checkpoints, self.callbacks, self.stop = checkpoints, callbacks, stop
        self.state = TrainState()
        self.run_dir = Path(run.folder())
        self.numerics = Numerics(
            run.watch,
            self.run_dir,
            rank=env.rank,
            # With fp16 an infinite gradient lowers the loss scale, and nothing is wrong.
            gradients=run.precision.dtype != "fp16",
        )
        self.elsewhere = Elsewhere(self.run_dir, env, wanted=run.watch.rerun_elsewhere)

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.plan.phases[self.state.phase]

    def fit(self) -> str:
        """Take steps until the last one or a request to stop; return the run's outcome word."""
        self.checkpoints.resume(self)
        self.enter_phase(new=self.state.phase_step == 0)
        for callback in self.callbacks:
            callback.before_training(self)

        while not self.plan.finished(self.state):
            for callback in self.callbacks:
                callback.before_step(self)
            # Asks every rank, so that all of them leave at the same step.
            if self.stop.requested():
                break
            metrics = self.step()
            for callback in self.callbacks:
                callback.after_step(self, metrics)
            if self.state.phase_tokens >= self.phase.config.tokens:
                self.end_phase()
            elif self.state.step % self.run.checkpoint.interval_steps == 0:
                self.save()
            else:
                self._saved(self.checkpoints.poll())

        outcome = "finished" if self.plan.finished(self.state) else "stopped"
        self.save()
        self._saved(self.checkpoints.finish())
        for callback in self.callbacks:
            callback.after_training(self, outcome)
        return outcome

    def step(self) -> Metrics:
        """One optimizer step of the running phase, counted in ``state``."""
        started = time.perf_counter()
        result = self._sound_step()
        phase, state, lr = self.phase, self.state, self.learning_rate()
        size = self.global_batch_size()
        self._count(phase, size, result.loss)
        return {
            "step": state.step,
            "tokens": state.tokens,
            "phase": phase.name,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "updated": result.updated,
            "global_batch_size": size,
            "seq_length": phase.seq_length,
            "seconds": time.perf_counter() - started,
        }

    def _sound_step(self) -> StepResult:
        """A step that was approved: a bad one is run again, and then its samples passed over."""
        while True:
            self.numerics.replay(self.state)
            again = self.numerics.tried(self.state)
            with self.elsewhere.locating(self.model) if again else nullcontext():
                result = self._try_step()
            if result.approved:
                self.numerics.taken(self.state, result.loss, result.grad_norm)
                self.elsewhere.sound(self.state)
                return result
            if self.numerics.first_time(self.state):
                continue
            self.elsewhere.suspect(self.state, self.numerics.fault)
            past = self.state.phase_samples + self.global_batch_size()
            if self.numerics.intervene(self.state) == "rewind" and self.checkpoints.saved_step:
                counted = self.state.place[:2]
                self._saved(self.checkpoints.finish())
                self.checkpoints.resume(self)
                self.enter_phase(new=False)
                for callback in self.callbacks:
                    callback.after_rewind(self)
                if self.state.place[:2] != counted:
                    continue  # the bad step is met, and passed over, when its place comes again
            self.numerics.skip(self.state, past)

    def _try_step(self) -> StepResult:
        phase, size = self.phase, self.global_batch_size()
        set_learning_rate(self.optimizer, self.learning_rate())
        packed = phase.config.packing == "document"
        micro = self.feed.micro_batch_size
        return train_step(
            self.model,
            self.optimizer,
            self.feed.step(phase, self.state, global_batch_size=size),
            num_microbatches=size // (micro * self.feed.size),
            micro_batch_size=1 if packed else micro,
            seq_length=phase.seq_length * micro if packed else phase.seq_length,
            groups=self.groups,
            # Every token counts where documents are not kept apart.
            loss_tokens=None if packed else size * phase.seq_length,
            judge=self.numerics.against(self.state),
        )

    def learning_rate(self) -> float:
        """Of the next step: a function of the phase's tokens alone."""
        return learning_rate(
            self.run.phases,
            self.run.optimizer,
            phase=self.phase.index,
            phase_tokens=self.state.phase_tokens,
        )

    def global_batch_size(self) -> int:
        """Sequences of the next step: by the plan, or grown by the loss."""
        if self.phase.config.batch_growth.max_global_batch_size:
            return int(self.state.growth["global_batch_size"])
        return self.phase.global_batch_size(self.state.phase_tokens)

    def _count(self, phase: Phase, size: int, loss: float) -> None:
        tokens, state = size * phase.seq_length, self.state
        state.step += 1
        state.phase_step += 1
        state.tokens += tokens
        state.phase_tokens += tokens
        state.samples += size
        state.phase_samples += size
        growth = phase.config.batch_growth
        if growth.max_global_batch_size:
            plateau = PlateauState.from_dict(state.growth)
            plateau.observe(loss, growth, step=state.step)
            state.growth = plateau.as_dict()

    def enter_phase(self, *, new: bool) -> None:
        """Put the model and optimizer in the state that the running phase asks for."""
        if self.plan.finished(self.state):
            return
        phase = self.phase
        set_rotary_base(self.model, phase.rotary_base)
        self.state.numbering = numbering(self.run, self.state)
        if not new:
            return
        if phase.config.optimizer_state == "reset" and self.state.step:
            reset_moments(self.optimizer)
        before, self.state.growth = self.state.growth, {}
        if phase.config.batch_growth.max_global_batch_size:
            own = phase.config.global_batch_size is not None
            growth = PlateauState.start(phase.first_batch, before=None if own else before)
            self.state.growth = growth.as_dict()

    def ledger(self) -> dict[str, Any]:
        """What each source has given so far."""
        if self.plan.finished(self.state):
            return self.state.ledger
        return self.feed.phase(self.phase, self.state).ledger_at(self.state.phase_samples)

    def end_phase(self) -> None:
        """Close the running phase: book its consumption, move on, and save."""
        phase, state = self.phase, self.state
        state.ledger = self.feed.phase(phase, state).ledger_at(state.phase_samples)
        state.phase += 1
        state.phase_step = state.phase_tokens = state.phase_samples = state.anchor_tokens = 0
        self.enter_phase(new=True)
        self.save(pinned=True)

    def save(self, *, pinned: bool = False) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.env.rank == 0 and self.env.attempt:
            lease.check(self.run_dir, self.env.attempt)
        if self.state.step:
            self._saved(self.checkpoints.finish())
            for callback in self.callbacks:
                callback.before_save(self)
            self._saved(self.checkpoints.save(self, pinned=pinned))

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            for callback in self.callbacks:
                callback.after_save(self, path)
