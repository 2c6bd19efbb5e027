"""A page in the browser that draws images of a run, see `docs/serving.md`."""
