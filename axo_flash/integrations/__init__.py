"""Other programs' plug-in points. Nothing of this package imports them; each needs the program that it plugs into."""
