"""The model that every chapter works on."""
