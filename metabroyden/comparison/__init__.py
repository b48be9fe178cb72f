"""Solvers on the same problems: measured in turns, summarised by one rule a statistic, shown as tables and figures."""
