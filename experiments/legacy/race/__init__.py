"""The race of all solvers on all families: contestants and problems → rows (`measure`) → statistics → figures and reports.

Rows are what `schema` says. `contestants`, `problems` and `measure` solve; the other modules read rows and solve nothing.
The rules are in results/race/PROTOCOL.md.
"""
