//! Small parts of schemas that more than one kind uses: CEL rules and their bounds.
//!
//! A rule carries the sentence that a person reads when it refuses something; it says what to write instead.

use serde_json::{Value, json};

/// The largest number of a field that has no smaller bound: 2^53 - 1, which every reader of JSON keeps exactly.
pub const MOST: i64 = (1 << 53) - 1;

/// Items of a list of addresses.
pub fn host_port() -> Value {
    json!({
        "type": "string", "minLength": 1, "maxLength": 262,
        "description": "host:port; an IPv6 address stands in brackets.",
    })
}

/// A CEL rule with the message that is shown when it does not hold.
pub fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

/// Rules of a size field: it is a whole number of bytes from `least` to `most` (quantities).
pub fn size_between(name: &str, least: &str, most: &str) -> Vec<Value> {
    vec![rule(
        &format!(
            "!isQuantity(string(self)) || (quantity(string(self)).isInteger() && \
             quantity(string(self)).compareTo(quantity('{least}')) >= 0 && \
             quantity(string(self)).compareTo(quantity('{most}')) <= 0)"
        ),
        &format!("{name} must be a whole number of bytes from {least} to {most}, such as 10Gi"),
    )]
}

/// [`size_between`] that also never becomes smaller.
pub fn growing_size_between(name: &str, least: &str, most: &str) -> Vec<Value> {
    let mut rules = size_between(name, least, most);
    rules.push(rule(
        "!isQuantity(string(self)) || !isQuantity(string(oldSelf)) || \
         quantity(string(self)).compareTo(quantity(string(oldSelf))) >= 0",
        &format!("{name} can only grow: what lies beyond a smaller size would be lost"),
    ));
    rules
}

/// Rules of a page or chunk size: a power of two from 64 KiB to 4 MiB.
pub fn power_of_two_size(name: &str) -> Vec<Value> {
    vec![rule(
        "!isQuantity(string(self)) || (quantity(string(self)).isInteger() && quantity(string(self)).asInteger() in \
         [65536, 131072, 262144, 524288, 1048576, 2097152, 4194304])",
        &format!("{name} must be a power of two from 64Ki to 4Mi: 64Ki, 128Ki, 256Ki, 512Ki, 1Mi, 2Mi or 4Mi"),
    )]
}
