"""The embedded model: how it was made, how well it does, and what `tlk demo` shows with it."""
