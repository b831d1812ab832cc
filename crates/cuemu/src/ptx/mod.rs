//! PTX → C++.
