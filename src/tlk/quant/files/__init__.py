"""Other tools' checkpoint layouts: pure functions between their tensors and tlk's packed ones."""
