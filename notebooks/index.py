# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # minitfm: the way in
#
# Each notebook here tells one technique for cheaper transformer inference on one real model: what hurts, the idea, the
# reference a few lines at a time, what the paper claims and what came out, the kernel's bytes, and exercises.
#
# Read a part from its first chapter on. If everything is new to you, begin with `attention/heads`, `attention/flash`,
# `quantization/uniform` and `quantization/gptq`.

# %%
import torch
from IPython.display import Markdown

from chapters import assignments, leaderboard
from chapters.contents import CONTENTS
from chapters.lab import Lab
from chapters.overview import book_map, outcomes, table_of_contents
from minitfm.generate import generate

outcome = outcomes()
book_map(CONTENTS, outcome)

# %% [markdown]
# A hatched box is a chapter whose claim did not show on a model this small; its notebook says what was tried. All
# chapters, with links:

# %%
assert "not recorded" not in outcome.values()
Markdown(table_of_contents(CONTENTS, outcome))

# %% [markdown]
# ## The model that everything works on
#
# A decoder-only transformer, trained on the documentation of Python's standard library. It is small enough for a
# laptop, and large enough for most of the papers' effects to show.

# %%
lab = Lab()
prompt = torch.tensor([lab.tokenizer.encode("The function returns")])
ids = generate(lab.model(), prompt, 40, temperature=0.7, top_k=50)
print(lab.tokenizer.decode(ids[0].tolist()))

# %% [markdown]
# ## The leaderboard
#
# Every compression of the weights, in every setting that its chapter lists, on one scale: to the left is smaller, down
# is better. `python -m chapters leaderboard gptq` measures one of them again.

# %%
board = leaderboard.read()
assert board is not None and all(point.bits < 32 for point in board.points)
leaderboard.picture(board)

# %% [markdown]
# Most of them are beaten by something smaller and better. Those that are not:

# %%
left = float("inf")
for point in sorted(board.points, key=lambda point: (point.bits, point.perplexity)):
    if point.perplexity < left:
        left = point.perplexity
        print(f"{point.bits:5.2f} bits, perplexity x {left / board.base:.2f}: {point.technique} {point.setting}")

# %% [markdown]
# ## Exercises, and a course
#
# Every chapter has functions for you to write. `python -m chapters exercise gptq --to my` writes the file to work in,
# `python -m chapters hint gptq.gptq` helps a step at a time, and the tests say whether it is right. Eight assignments
# lead through the book:

# %%
course = assignments.read()
assert len(course) == 8
for each in course:
    print(f"{each.number}. {each.title}: {each.points} points, about {each.minutes} minutes")

# %% [markdown]
# Release one as a folder of its own with `python -m chapters assignment 1 --to mine`, and begin.
