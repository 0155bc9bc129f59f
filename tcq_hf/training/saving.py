"""SavingTrainer: checkpoints that are whole when they appear, and hold what a Hub repository holds."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from tcq_hf import hub
from tcq_hf.model.modeling_tcq import TCQModel

# Checkpoints lie here until they are whole.
_ASIDE = ".saving"
# Folder in a checkpoint that holds what peft needs to go on.
_ADAPTERS = "adapters"


class SavingTrainer(Trainer):
    """transformers' `Trainer` that saves with `hub.save`, each checkpoint aside until it is whole."""

    # Figures of the last evaluation, for the model card.
    results: dict[str, float] = {}
    _aside: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hub.check_adapters(self._unwrapped)

    @property
    def core(self) -> TCQModel:
        """The model itself, outside of what the Trainer and peft wrap it in."""
        model = self._unwrapped
        return model.get_base_model() if self.has_adapters else model

    @property
    def has_adapters(self) -> bool:
        """Whether the model is a `peft.PeftModel`."""
        return hasattr(self._unwrapped, "get_base_model")

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        hub.save(self._unwrapped, self.processing_class, folder, *self._card(), model_id=self.hub_model_id)
        if self.has_adapters and self._aside is not None:
            self._unwrapped.save_pretrained(folder / _ADAPTERS, save_embedding_layers=False)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card of the package."""
        if self.is_world_process_zero():
            card = hub.model_card(hub.merged(self._unwrapped), *self._card(), self.hub_model_id or model_name or "")
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _card(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of figures and recipe for the model card."""
        names = {"map": "mAP@1000", "map_strict": "mAP@1000, min(k, relevant)", "precision@10": "P@10"}
        row = {
            text: f"{self.results[f'eval_{name}']:.4f}"
            for name, text in names.items()
            if f"eval_{name}" in self.results
        }
        if not row:
            return [], {}
        args = self.args
        recipe = {
            "data": "each row of the evaluation set queries the others",
            "denominator and ties": "hits within k, ties at random; min(k, relevant), ties in expectation",
            "training": f"step {self.state.global_step}, seed {args.seed}, {args.filter_name}, "
            f"temperature {args.temperature}, learning rate {args.learning_rate}",
        }
        return [{"search with": f"{self.core.config.bits}-bit codes", **row}], recipe

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint, _ADAPTERS) if self.has_adapters else resume_from_checkpoint
        super()._load_from_checkpoint(str(folder), model)

    def _load_best_model(self) -> None:
        if self.has_adapters:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer does it, but aside, so that a folder named checkpoint-N is always whole."""
        run_dir = Path(self._get_output_dir(trial))
        target, aside = run_dir / f"checkpoint-{self.state.global_step}", run_dir / _ASIDE
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_checkpoint(aside / target.name, target)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _name_checkpoint(self, written: Path, target: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        if target.exists():
            target.rename(written.with_name("replaced"))
        written.rename(target)
        shutil.rmtree(written.parent)
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        rotate_checkpoints(
            output_dir=str(target.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)
