//! methods (being written).
