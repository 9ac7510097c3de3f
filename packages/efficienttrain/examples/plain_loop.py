"""A training loop without any framework, through all stages of a curriculum in one process.

    python examples/plain_loop.py --out run

takes less than a minute of one CPU thread and ends with

    407 updates, accuracy on held-out digits: 93.2 %

Killed, the same command goes on at the last update that was saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import Digits, accuracy, make_curriculum, make_model, make_transform, options

import leap_efficienttrain as et
from leap_shared.checkpoints import CheckpointFolder


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and judge; the accuracy on held-out digits in percent."""
    given = options(__doc__, arguments)
    train, test = Digits(train=True), Digits(train=False)
    model, curriculum = make_model(), make_curriculum(given.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    flex = et.flexible(model, optimizer=optimizer)
    loader = et.CurriculumLoader(train, make_transform(), num_classes=10)
    plan = curriculum.plan(len(train))
    done = 0

    folder = None if given.out is None else CheckpointFolder(given.out)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    if folder is not None and (saved := folder.latest()) is not None:
        done = int(torch.load(saved, weights_only=True)["step"])
        flex.set_size(plan.at(done - 1).size)  # the saved weights are of this stage
        folder.restore(parts)

    for state in curriculum.epochs(len(train), start=plan.at(done).epoch if done < plan.updates else len(plan.states)):
        flex.set_size(state.size)
        loader.set_state(state, start=done - state.first_update)
        losses = []
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr(done)
            loss = F.cross_entropy(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            done += 1
            if done == given.stop:
                break
        mean = sum(losses) / len(losses)
        print(f"pass {state.epoch:3d}  {state.size} pixels  magnitude {state.magnitude}  loss {mean:.3f}")
        if folder is not None:
            folder.save(done, parts)
        if done == given.stop:
            return 0.0

    score = accuracy(model, test)
    print(f"{done} updates, accuracy on held-out digits: {score:.1f} %")
    return score


if __name__ == "__main__":
    main()
