"""What becomes of every tensor, one module for each pair of formats, and the settings that go with it."""
