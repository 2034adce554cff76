//! Sizes as people write them: `10Gi`, `500G`, `1.5Ti` or a plain number of bytes.
//!
//! Invariant: the text is kept as it was written, so what is applied again is what was applied before; [`Size::bytes`]
//! reads the same value out of it as the API server's CEL `quantity()` does.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, written as a Kubernetes quantity. Serialized as it was read, a plain number as a number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Size(String);

/// A text that is not a whole number of bytes below 2^63. The API server refuses such a text before anybody else sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a size is a whole number of bytes such as 10Gi, 500G or 1073741824")]
pub struct NotASize;

const UNITS: [(&str, u128); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
];

impl Size {
    /// So many bytes, written as the largest binary unit that holds them exactly.
    pub fn of_bytes(bytes: u64) -> Self {
        let unit = UNITS[..6].iter().rev().find(|(_, unit)| bytes > 0 && u128::from(bytes) % unit == 0);
        Self(unit.map_or_else(|| bytes.to_string(), |(name, unit)| format!("{}{name}", u128::from(bytes) / unit)))
    }

    /// The bytes.
    ///
    /// # Errors
    /// [`NotASize`] if the text is not a size, has a fraction of a byte, or is 2^63 or more.
    pub fn bytes(&self) -> Result<u64, NotASize> {
        let text = self.0.as_str();
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| text.strip_suffix(name).map(|digits| (digits, *unit)))
            .unwrap_or((text, 1));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) || digits.len() > 24 {
            return Err(NotASize);
        }
        let scaled = format!("{whole}{fraction}").parse::<u128>().map_err(|_| NotASize)?;
        let divisor = 10_u128.pow(fraction.len() as u32);
        let bytes = scaled.checked_mul(unit).filter(|bytes| bytes % divisor == 0).ok_or(NotASize)? / divisor;
        i64::try_from(bytes).map(i64::unsigned_abs).map_err(|_| NotASize)
    }
}

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let size = Self(text.to_owned());
        size.bytes().map(|_| size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.parse::<i64>() {
            Ok(number) if number.to_string() == self.0 => serializer.serialize_i64(number),
            _ => serializer.serialize_str(&self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(i64),
            Text(String),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Number(number) => Self(number.to_string()),
            Written::Text(text) => Self(text),
        })
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 24,
            "pattern": r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Result<u64, NotASize> {
        Size(text.to_owned()).bytes()
    }

    #[test]
    fn a_size_is_read_as_kubernetes_reads_a_quantity() {
        assert_eq!(bytes("10Gi"), Ok(10 << 30));
        assert_eq!(bytes("1.5Gi"), Ok(3 << 29));
        assert_eq!(bytes("500G"), Ok(500_000_000_000));
        assert_eq!(bytes("4096"), Ok(4096));
        for bad in ["", "Gi", "-1", "1.3", "10GiB", "0x10", "1e3", "8Ei", "9999999999999999999999999"] {
            assert_eq!(bytes(bad), Err(NotASize), "{bad}");
        }
    }

    #[test]
    fn a_size_is_written_back_as_it_was_read() {
        for text in ["\"10Gi\"", "4096", "\"1.50Gi\"", "\"010\""] {
            let size: Size = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&size).unwrap(), text);
        }
        assert_eq!(Size::of_bytes(3 << 29).to_string(), "1536Mi");
        assert_eq!(Size::of_bytes(0).to_string(), "0");
    }
}
