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
# A language model writes one token at a time, and for each it reads all of its weights and all that it remembers of the
# text. This is a book about making that cheaper: fewer bits for a number, fewer numbers, fewer passes over them. Each
# chapter takes one published technique and tells it four times under one name: as a reference that can be read
# (`chapters/`), as a GPU kernel (`kernels/`), as tests that grade your own version, and as a notebook that shows what
# it does to a real model.
#
# The notebooks are what you see here. Each takes 15 to 20 minutes to read: what hurts on the real model, the idea, the
# reference a few lines at a time, what the paper claims and what came out, the kernel's bytes, and exercises. You need
# linear algebra, some Python and a first course on deep learning that had transformers in it. A question before a
# figure is meant: answer it before you look. Everything can be read as it stands, pictures included.
# Opened with `make lab`, the notebooks are live, and some figures then have sliders.
#
# ## The chapters
#
# What came out of every chapter's claim, measured on our model with three seeds:

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
# A hatched box is a chapter whose claim did not show on a model this small; its notebook says what was tried.
#
# Where to begin?
#
# - **Everything is new:** [heads](attention/heads.ipynb), then [FlashAttention](attention/flash.ipynb),
#   [uniform quantization](quantization/uniform.ipynb) and [GPTQ](quantization/gptq.ipynb).
# - **What happens in a server:** [heads](attention/heads.ipynb), [FlashAttention](attention/flash.ipynb),
#   [Flash-Decoding](attention/flash_decoding.ipynb), [PagedAttention](attention/paged.ipynb),
#   [the quantized cache](quantization/kv_cache.ipynb).
# - **A model has to fit into less memory:** [uniform quantization](quantization/uniform.ipynb),
#   [GPTQ](quantization/gptq.ipynb), [AWQ](quantization/awq.ipynb), [Wanda](pruning/wanda.ipynb),
#   [soft targets](distillation/soft_targets.ipynb).
# - **You have a model:** [your own model](own_model.ipynb) does three of the techniques to it.
#
# Otherwise read a part from its first chapter on. All chapters, with links:

# %%
assert "not recorded" not in outcome.values()
Markdown(table_of_contents(CONTENTS, outcome))

# %% [markdown]
# ## The model that everything works on
#
# A decoder-only transformer, built like Llama and trained on the documentation of Python's standard library. It is
# small enough for a laptop, and large enough for most of the papers' effects to show. Almost every chapter asks what a
# technique does to its perplexity: the number of tokens between which the model wavers, on average, if they were
# equally likely. One that knows nothing has as many as there are tokens in the vocabulary; 1 would be to know the next
# token every time.

# %%
lab = Lab()
config, size = lab.config, lab.model().num_parameters()
print(f"{size:,} parameters: {config.layers} layers of {config.dim} channels, feed-forward {config.hidden_dim}")
print(f"{config.heads} heads of {config.head_dim} channels, {config.kv_heads} with keys and values of their own")
print(f"{config.vocab_size:,} tokens in the vocabulary, texts of up to {config.context}")
print(f"perplexity {lab.base_perplexity:.1f} on the text that notebooks measure with")
assert 1 < lab.base_perplexity < config.vocab_size / 20

# %% [markdown]
# That is a part of the text that it was not trained on. Recorded claims and the leaderboard use more of it, so their
# numbers differ a little from those in the notebooks. And this is how it writes, which is in the style of its text and
# makes no sense:

# %%
prompt = torch.tensor([lab.tokenizer.encode("The function returns")])
ids = generate(lab.model(), prompt, 40, temperature=0.7, top_k=50)
print(lab.tokenizer.decode(ids[0].tolist()))

# %% [markdown]
# ## The leaderboard
#
# Every compression of the weights, in every setting that its chapter lists, on one scale: to the left is smaller, down
# is better, and the dashed line is the plain model, whose weights have 32 bits. What lies off the scale stands at the
# top with its numbers. Where would you look for the best use of four bits?
# `python -m chapters leaderboard gptq` measures one of the techniques again.

# %%
board = leaderboard.read()
assert board is not None and all(point.bits < 32 for point in board.points)
leaderboard.picture(board)

# %% [markdown]
# From eight bits down to four nearly nothing is lost, if the grid is chosen with some care; below four the techniques
# part. Most of these points are beaten by something smaller and better. Those that are not, and what they multiply
# perplexity by:

# %%
left = float("inf")
for point in sorted(board.points, key=lambda point: (point.bits, point.perplexity)):
    if point.perplexity < left:
        left = point.perplexity
        print(f"{point.bits:5.2f} bits, perplexity x {left / board.base:.2f}: {point.technique} {point.setting}")

# %% [markdown]
# ## Exercises, and a course
#
# Every chapter has functions for you to write. In the project's folder, `python -m chapters exercise gptq --to my`
# writes the file to work in, `python -m pytest --submission my tests/quantization/test_gptq.py` says whether it is
# right, and `python -m chapters hint gptq.gptq` helps a step at a time. The last lines of each notebook name its own.
# Eight assignments lead through the book:

# %%
course = assignments.read()
assert len(course) == 8
for each in course:
    print(f"{each.number}. {each.title}: {each.points} points, about {each.minutes} minutes")

# %% [markdown]
# Release one as a folder of its own with `python -m chapters assignment 1 --to mine`, and begin.
