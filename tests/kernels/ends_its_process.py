"""A kernel file that takes the process down, as a crash in the compiler would."""

import os

os._exit(139)
