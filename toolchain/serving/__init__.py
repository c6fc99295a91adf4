"""Serving engines and the memory planner; an engine is one file here and one template folder."""
