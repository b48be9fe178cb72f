"""Recipes as data: what differs from the library's plan, by solver and family."""
