"""Where a model stands for the compute spent: score tables, budgets, factors, laws."""
