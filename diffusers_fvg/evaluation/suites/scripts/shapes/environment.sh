# The scorer of the shapes world is this program's own: there is nothing to install.
