"""What the tests of the Trainer share: arguments for tiny runs, features to start from."""

import pytest
import torch
from transformers import TrainerCallback

from tcq_hf import TCQModel, TCQTrainer, TCQTrainingArguments, extract_features


@pytest.fixture
def started(tiny_config, dataset, processor) -> TCQModel:
    """A tiny model whose projection and codebooks were fitted to the drawn pictures; fresh for each test."""
    torch.manual_seed(0)
    made = TCQModel(tiny_config)
    return made.initialize(extract_features(dataset, made, processor))


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments of a short, silent run on the CPU."""

    def make(**changed):
        given = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            # The plain method; what the defaults add is tested in test_pseudo_labels.py.
            "negative_filter": "fraction",
            "positives": "views",
        }
        return TCQTrainingArguments(**(given | changed))

    return make


@pytest.fixture
def trainer(started, arguments, dataset, processor):
    """Makes a trainer of the started model on the drawn pictures."""

    def make(model=None, train_dataset=dataset, eval_dataset=None, callbacks=None, **changed):
        model = started if model is None else model
        return TCQTrainer(model, arguments(**changed), train_dataset, eval_dataset, processor, callbacks=callbacks)

    return make


@pytest.fixture
def stop_at():
    """Makes callbacks that end training after a step, as an interruption would, but with a checkpoint."""

    class StopAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                control.should_save = control.should_training_stop = True

    return StopAt
