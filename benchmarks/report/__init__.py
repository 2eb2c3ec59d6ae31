"""Tables, plots and the drawing of the documentation."""
