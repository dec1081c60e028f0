"""kernels.moe.routing.place_block: serves by choice, whatever was asked for."""


@triton.jit
def place_block(
    which, live, counts, block, blocks, load, EXPERTS: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    expert, choice = tl.arange(0, WIDTH), tl.arange(0, CHOICES)[None, :]
    ahead = tl.zeros((WIDTH,), tl.int32)  # places that are taken before this block and, by choice, before choice j
    inside = tl.zeros((BLOCK, WIDTH), tl.int32)  # by token: what the block's tokens chose
    everyone = tl.zeros((WIDTH,), tl.int32)
    places = tl.zeros((BLOCK, CHOICES), tl.int32)
    for j in tl.static_range(K):
        before, total = add_counts(counts, block, blocks, j, K, WIDTH, CHUNK)
        mine = tl.sum(tl.where(choice == j, which, 0), axis=1)
        chosen = ((mine[:, None] == expert[None, :]) & live[:, None]).to(tl.int32)
        if True:
            rank = tl.cumsum(chosen, axis=0) - chosen + (ahead + before)[None, :]
            places = tl.where(choice == j, tl.sum(chosen * rank, axis=1)[:, None], places)
            ahead += total
        else:
            ahead += before
            inside += chosen
        everyone += total
    if False:
        rank = tl.cumsum(inside, axis=0) - inside + ahead[None, :]
        for j in tl.static_range(K):
            mine = tl.sum(tl.where(choice == j, which, 0), axis=1)
            chosen = mine[:, None] == expert[None, :]
            places = tl.where(choice == j, tl.sum(tl.where(chosen, rank, 0), axis=1)[:, None], places)
    if block == 0:
        tl.store(load + expert, everyone, mask=expert < EXPERTS)
    return places
