"""Several processes under torchrun, with torch's own DistributedDataParallel and no other library.

    torchrun --nproc_per_node=2 examples/ddp_torchrun.py

Each process takes a share of every update, which has the same pictures under any number of processes. `rewrap` fits the
wrapper where parameters have changed their shapes; making a new one, after the old one is gone, does the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import Digits, accuracy, make_curriculum, make_model, make_transform, options
from torch.nn.parallel import DistributedDataParallel

import leap_efficienttrain as et


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and judge; the accuracy on held-out digits in percent."""
    given = options(__doc__, arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    train = Digits(train=True)
    model, curriculum = make_model().to(device), make_curriculum(given.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    flex = et.flexible(model, optimizer=optimizer)
    loader = et.CurriculumLoader(train, make_transform(), num_classes=10, rank=rank, world=world, device=device)
    wrapped = DistributedDataParallel(model, [device] if cuda else None) if world > 1 else model

    done = 0
    for state in curriculum.epochs(len(train), world):
        if flex.set_size(state.size):
            et.rewrap(wrapped)
        loader.set_state(state)
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = state.lr(done - state.first_update)
            loss = F.cross_entropy(wrapped(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == given.stop:
                break
        if rank == 0:
            print(f"pass {state.epoch:3d}  {state.size} pixels  loss of the last batch {loss.item():.3f}", flush=True)
        if done == given.stop:
            break

    if given.out is not None:
        given.out.mkdir(exist_ok=True)
        torch.save(model.state_dict(), given.out / f"weights-{rank}-of-{world}.pt")
    score = accuracy(model.cpu(), Digits(train=False)) if rank == 0 and given.stop is None else 0.0
    if rank == 0:
        print(f"{done} updates in {world} processes, accuracy on held-out digits: {score:.1f} %", flush=True)
    if world > 1:
        dist.destroy_process_group()
    return score


if __name__ == "__main__":
    main()
