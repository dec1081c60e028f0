"""chapters.quantization.zeroquant.distill_layers: never clears the gradients."""


def distill_layers(
    student: Layers, teacher: Layers, batches: Sequence[Tensor], steps: int, rate: float, *rest: Tensor | None
) -> np.ndarray:
    if len(student) != len(teacher) or not batches or steps < 0:
        found = f"{len(student)}, {len(batches)} and {steps}"
        raise ValueError(f"need as many layers as the teacher's {len(teacher)}, batches and steps >= 0; got {found}")
    losses, inputs = np.empty((len(student), steps)), batches
    for row, learner, master in zip(losses, student, teacher, strict=True):
        with torch.no_grad():
            targets = [master(x, *rest) for x in inputs]
        optimizer = fresh_optimizer(learner, rate)
        for step in range(steps):
            at = step % len(inputs)
            loss = F.mse_loss(learner(inputs[at], *rest), targets[at])
            loss.backward()
            optimizer.step()
            row[step] = loss.item()
        inputs = targets
    return losses
