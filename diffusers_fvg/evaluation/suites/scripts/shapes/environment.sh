# The scorer of the shapes suite is part of this program: there is nothing to install.
