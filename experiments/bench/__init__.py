"""One way to measure: problems, solvers, rows, statistics, tables, figures and reports that all experiments share."""
