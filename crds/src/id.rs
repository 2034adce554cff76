//! Ids as the API shows them: 32 lower-case hexadecimal digits of a random 128-bit value (PROTOCOL.md, Identity).

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The text of an id. The API server refuses any that is not 32 lower-case hexadecimal digits; one read from elsewhere
/// may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Id(pub String);

impl Id {
    /// The id of this value.
    pub fn of(value: u128) -> Self {
        Self(format!("{value:032x}"))
    }

    /// The value; `None` if the text is not 32 hexadecimal digits.
    pub fn value(&self) -> Option<u128> {
        let digits = self.0.len() == 32 && self.0.bytes().all(|b| b.is_ascii_hexdigit());
        digits.then(|| u128::from_str_radix(&self.0, 16).ok()).flatten()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl JsonSchema for Id {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Id".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 32, "maxLength": 32, "pattern": "^[0-9a-f]{32}$",
            "description": "32 lower-case hexadecimal digits.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_its_text() {
        assert_eq!(Id::of(0xab).0, "000000000000000000000000000000ab");
        assert_eq!(Id::of(u128::MAX).value(), Some(u128::MAX));
        assert_eq!(Id("+00000000000000000000000000000ab".into()).value(), None);
        assert_eq!(Id("ab".into()).value(), None);
    }
}
