//! Presence of what CSI requires in a request.
//!
//! Invariant: a handler that first asks for all its required fields here and only then looks anything up answers
//! INVALID_ARGUMENT for an incomplete request also when the volume or node that it names does not exist. CSI and csi-sanity
//! expect that order: a handle that is none of ours is NOT_FOUND, but only in a request that is complete.

use tonic::Status;

/// A required field was left empty. The caller is wrong: INVALID_ARGUMENT, and the same request will never do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is required")]
pub struct MissingField {
    /// As spelled in the .proto.
    pub field: &'static str,
}

impl From<MissingField> for Status {
    fn from(error: MissingField) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// The text of a field that must not be empty.
///
/// # Errors
/// [`MissingField`] if it is.
pub fn required<'a>(field: &'static str, text: &'a str) -> Result<&'a str, MissingField> {
    if text.is_empty() { Err(MissingField { field }) } else { Ok(text) }
}

/// The message of a field that must be there.
///
/// # Errors
/// [`MissingField`] if it is not.
pub fn required_message<'a, M>(field: &'static str, message: &'a Option<M>) -> Result<&'a M, MissingField> {
    message.as_ref().ok_or(MissingField { field })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn a_missing_field_is_named_in_the_answer() {
        let status = Status::from(required("target_path", "").unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("target_path"));
        let status = Status::from(required_message::<()>("volume_capability", &None).unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("volume_capability"));
    }

    #[test]
    fn a_present_field_comes_back_unchanged() {
        assert_eq!(required("volume_id", " x "), Ok(" x "));
        assert_eq!(required_message("n", &Some(7)), Ok(&7));
    }
}
