//! The tape (helper TAPE writes it).
