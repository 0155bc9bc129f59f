"""TCQTrainer in several processes, and in one that is killed in the middle of saving."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from tcq_hf import TCQModel

# A tiny run on a folder of pictures; what differs between the tests follows.
SCRIPT = """
import gc, json, os, sys
import datasets, torch
from tcq_hf import TCQImageProcessor, TCQModel, TCQTrainer, TCQTrainingArguments

torch.set_num_threads(1)
folder, start, output = sys.argv[1:4]
pictures = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
processor = TCQImageProcessor.from_backbone("vit_tiny_patch16_224", image_size=32)


def make(**changed):
    given = {
        "output_dir": output, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-2, "usage_weight": 0.1,
        "debias_prior": 0.05, "max_grad_norm": 0.0,
    }
    arguments = TCQTrainingArguments(**(given | changed))
    return TCQTrainer(TCQModel.from_pretrained(start), arguments, pictures, processing_class=processor)
"""


@pytest.fixture
def run(picture_folder, started, tmp_path):
    """Runs the script with some lines more; under torchrun if there are several processes."""
    started.save_pretrained(tmp_path / "start")

    def go(lines, output, processes=1):
        (tmp_path / "script.py").write_text(SCRIPT + textwrap.dedent(lines))
        command = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        places = [str(tmp_path / "script.py"), str(picture_folder), str(tmp_path / "start"), str(tmp_path / output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run([*command, *places], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / output

    return go


def test_two_processes_learn_what_one_learns_from_the_joint_batch(run):
    lines = """
    descent = dict(optim="sgd", learning_rate=0.5, gradient_accumulation_steps=2, loss_chunk_size={chunk})
    for name, options in (("soft", dict()), ("cross", dict(loss_form="cross")), ("chunked", descent)):
        folder = output + "/" + name
        trainer = make(output_dir=folder, per_device_train_batch_size={batch}, ddp_backend={backend}, **options)
        trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            json.dump([e for e in trainer.state.log_history if "loss" in e], open(folder + "/log.json", "w"))
    trainer.end()
    # DistributedDataParallel holds the threads of gloo, which abort the process if Python's end finds them.
    del trainer
    gc.collect()
    """
    alone = run(lines.format(batch=16, backend=None, chunk=None), "alone")
    joint = run(lines.format(batch=8, backend="'gloo'", chunk=3), "joint", processes=2)
    start = TCQModel.from_pretrained(alone.parent / "start").state_dict()
    # The last one: chunks of 3 pictures in each of two processes, steps along the gradient itself, of two batches.
    for form, close in (("soft", 0.05), ("cross", 0.05), ("chunked", 1e-3)):
        logs = [json.loads((folder / form / "log.json").read_text()) for folder in (alone, joint)]
        for one, both in zip(*logs, strict=True):
            # Sums of at most 64 terms of order one in another order; three steps of Adam carry them on.
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert both["dropped_share"] == pytest.approx(one["dropped_share"])
        models = [TCQModel.from_pretrained(folder / form).state_dict() for folder in (alone, joint)]
        for name, tensor in models[0].items():
            moved = (tensor - start[name]).norm()
            assert moved > 0
            assert (tensor - models[1][name]).norm() < close * moved, name


def test_a_checkpoint_cut_off_by_a_kill_at_any_moment_leaves_one_that_loads(run, tmp_path):
    # Each forked child resumes at checkpoint 1 and kills itself at another file operation of saving checkpoint 2.
    lines = """
    import shutil, signal
    from pathlib import Path
    from transformers.trainer_utils import get_last_checkpoint

    options = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make(max_steps=1, **options).train()
    shutil.copytree(output, output + "-one")
    left = [None]
    watched = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}


    def audit(event, arguments):
        if left[0] is not None and event in watched and "saving" in str(arguments) + output:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1


    sys.addaudithook(audit)
    killed, moment = [], 0
    while True:
        shutil.rmtree(output)
        shutil.copytree(output + "-one", output)
        child = os.fork()
        if child == 0:
            trainer = make(max_steps=2, **options)
            save = trainer._save_checkpoint

            def cut_off(*arguments):
                left[0] = moment
                save(*arguments)
                left[0] = None

            trainer._save_checkpoint = cut_off
            trainer.train(resume_from_checkpoint=True)
            os._exit(0)
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            break  # so many operations there are not
        last = get_last_checkpoint(output)
        model = TCQModel.from_pretrained(last)
        json.load(open(os.path.join(last, "trainer_state.json")))
        torch.load(os.path.join(last, "optimizer.pt"), weights_only=True)
        killed.append(Path(last).name)
        moment += 1 + moment // 4
    # From the last mess training goes on to its end.
    make(max_steps=3, **options).train(resume_from_checkpoint=True)
    json.dump(killed, open(output + "-killed.json", "w"))
    """
    output = run(lines, "saving")
    killed = json.loads((tmp_path / "saving-killed.json").read_text())
    assert {"checkpoint-1", "checkpoint-2"} <= set(killed)  # before the new one is whole, and after
    assert len(killed) > 8
    assert [path.name for path in output.iterdir()] == ["checkpoint-3"]
