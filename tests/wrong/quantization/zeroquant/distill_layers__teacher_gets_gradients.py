"""chapters.quantization.zeroquant.distill_layers: keeps the graph of the teacher, and trains it, too."""


def distill_layers(
    student: Layers, teacher: Layers, batches: Sequence[Tensor], steps: int, rate: float, *rest: Tensor | None
) -> np.ndarray:
    if len(student) != len(teacher) or not batches or steps < 0:
        found = f"{len(student)}, {len(batches)} and {steps}"
        raise ValueError(f"need as many layers as the teacher's {len(teacher)}, batches and steps >= 0; got {found}")
    losses, inputs = np.empty((len(student), steps)), batches
    for row, learner, master in zip(losses, student, teacher, strict=True):
        optimizer = fresh_optimizer(nn.ModuleList([learner, master]), rate)
        for step in range(steps):
            at = step % len(inputs)
            targets = [master(x, *rest) for x in inputs]
            loss = F.mse_loss(learner(inputs[at], *rest), targets[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row[step] = loss.item()
        inputs = [target.detach() for target in targets]
    return losses
