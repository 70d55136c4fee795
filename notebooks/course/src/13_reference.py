# %% [markdown]
# # 13 Reference: where was that?
#
# A chapter tells a story once. This page is for the second time: a word whose meaning has slipped away, an equation
# of the report whose code you want to see, a number that must have been decided by somebody. Nothing here is new.
# Every link opens the notebook at the cell it names, and every table was drawn from files in `data/` and from the
# notebooks themselves, so what it points to is there.
#
# **You will be able to**
# 1. find what a term means, and the cell that introduced it;
# 2. go from an equation, section, figure or table of the report to its code, its test and the cell that shows it;
# 3. see what the report leaves open, what was chosen here, and why;
# 4. look up a statement of the report, or of the article that made it widely known, and how it fares here.
#
# **You need** nothing.

# %% [markdown]
# ## Words and letters
#
# *Introduced* links the cell that explains the word. Numbers are those of the real model.
#
# {table:glossary}

# %% [markdown]
# ## From an equation to its code
#
# The index below is a file. So a line is enough to read the code behind an equation; try "Eq. 1", "Fig. 4", or
# "Eq. 21, 22" with `work="V3"`.

# %%
import csv
import inspect
from pathlib import Path
from pydoc import locate

text = Path("../data/paper_index.csv").read_text("utf-8")
index = list(csv.DictReader(text.splitlines()))


def code_of(item, work="V3.2-Exp"):
    """Print the code behind an equation, section, figure or table."""
    [row] = [r for r in index if (r["work"], r["item"]) == (work, item)]
    print(f"# {row['says']}\n")
    for name in row["functions"].split():
        print(inspect.getsource(locate(name)))


code_of("Eq. 2")

# %%
from course.ui.claims import claim

shown = [row for row in index if row["functions"] and row["claims"]]
claim(
    "index-leads-somewhere",
    all(row["functions"] or row["note"] for row in index),
    f"of {len(index)} rows {len(shown)} lead to code, a test and a cell;"
    " the others say why not",
)

# %% [markdown]
# ## The reports, item by item
#
# Every numbered item of the report on V3.2-Exp, and those of other reports that the package cites. *Shown by* names
# claims; their links lead to the cells that assert them. Tests are named by the sentences that they hold to.
#
# {table:papers}

# %% [markdown]
# ## What the report does not say, and what we chose
#
# A report of six pages leaves much open. Some of it is in the published code, some can be measured, and some had to
# be decided. Each line begins with its chapter and ends with the code and the cells that show it.
#
# {table:choices}

# %% [markdown]
# ## What is said, and what stands
#
# Every statement of the article and of the report on V3.2-Exp, and how it fares in this course. *Reproduced*: cells
# measure it, at our size. *In part*: they measure some of it, or find it weaker than said; the note says what.
# *Modelled*: it follows from counts that a cell asserts. *Contradicted*: a cell shows the opposite. *Published*: only
# the published figure can be shown. The links lead to the cells.
#
# {table:ledger}
