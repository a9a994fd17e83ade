"""Data sets, one file each; a new file with a `@register("data")` class is known at once. See `data.task.Task`."""
