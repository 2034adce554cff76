//! Every field says what it is and has bounds; without them neither people nor the CEL cost estimate know what to expect.
#![allow(clippy::unwrap_used)]

use serde_json::Value;

/// Fields that carry no bounds of their own, with the reason.
const WITHOUT_BOUNDS: [(&str, &str); 0] = [];

fn schemas() -> Vec<(String, Value)> {
    let manifests = lamina_crds::manifests().unwrap();
    assert_eq!(manifests.len(), 3);
    let schema = |m: &lamina_crds::Manifest| {
        let version = &serde_json::to_value(&m.crd).unwrap()["spec"]["versions"][0];
        (m.crd.spec.names.kind.clone(), version["schema"]["openAPIV3Schema"].clone())
    };
    manifests.iter().map(schema).collect()
}

/// Calls `look` with the path and schema of every property and every list item.
fn walk(path: &str, schema: &Value, look: &mut impl FnMut(&str, &Value)) {
    look(path, schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        walk(&format!("{path}.{name}"), property, look);
    }
    if schema["items"].is_object() {
        walk(&format!("{path}[]"), &schema["items"], look);
    }
}

fn faults(of: impl Fn(&Value) -> Option<&'static str>) -> Vec<String> {
    let mut found = Vec::new();
    let mut seen = 0;
    for (kind, schema) in schemas() {
        walk(&kind, &schema, &mut |path, schema| {
            seen += 1;
            if let Some(fault) = of(schema)
                && !WITHOUT_BOUNDS.iter().any(|(known, _)| *known == path)
            {
                found.push(format!("{path}: {fault}"));
            }
        });
    }
    assert!(seen > 200, "only {seen} fields were looked at");
    found
}

fn none(found: &[String]) {
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_field_says_what_it_is() {
    none(&faults(|schema| match schema["description"].as_str() {
        None => Some("no description"),
        Some(text) if text.len() < 10 => Some("a description that says nothing"),
        Some(text) if !text.ends_with('.') => Some("a description that is no sentence"),
        Some(_) => None,
    }));
}

#[test]
fn every_field_is_bounded() {
    let bounds = |schema: &Value| {
        let has = |names: &[&str]| names.iter().all(|name| !schema[name].is_null());
        match schema["type"].as_str() {
            Some("integer" | "number") if !has(&["minimum", "maximum"]) => {
                Some("an integer without minimum or maximum")
            }
            Some("string") if !has(&["maxLength"]) && !has(&["enum"]) => Some("a string without maxLength or enum"),
            Some("array") if !has(&["maxItems"]) => Some("a list without maxItems"),
            Some("object") if !schema["additionalProperties"].is_null() && !has(&["maxProperties"]) => {
                Some("a map without maxProperties")
            }
            None if !has(&["x-kubernetes-int-or-string", "maxLength", "pattern"]) => Some("neither type nor bounds"),
            _ => None,
        }
    };
    none(&faults(bounds));
}

#[test]
fn every_field_is_one_that_the_api_server_takes_without_a_warning() {
    none(&faults(|schema| {
        let unsigned = schema["format"].as_str().is_some_and(|f| f.starts_with("uint"));
        match () {
            () if unsigned => Some("an unsigned format"),
            () if schema["nullable"] == true => Some("nullable: has() would not mean what it says"),
            () if !schema["anyOf"].is_null() || !schema["oneOf"].is_null() => Some("alternatives"),
            () if schema["x-kubernetes-preserve-unknown-fields"] == true => Some("takes unknown fields"),
            () => None,
        }
    }));
}

#[test]
fn every_list_says_who_may_own_its_items() {
    none(&faults(|schema| {
        let list = schema["type"] == "array" && schema["x-kubernetes-list-type"].is_null();
        list.then_some("a list without x-kubernetes-list-type")
    }));
}

#[test]
fn every_rule_tells_a_person_what_to_do() {
    let mut rules = 0;
    for (kind, schema) in schemas() {
        walk(&kind, &schema, &mut |path, schema| {
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                rules += 1;
                assert!(rule["message"].as_str().is_some_and(|m| m.len() > 20), "{path}: {rule}");
            }
        });
    }
    assert!(rules >= 20, "only {rules} rules");
}

#[test]
fn every_column_shows_a_field_that_exists() {
    for manifest in lamina_crds::manifests().unwrap() {
        let version = serde_json::to_value(&manifest.crd).unwrap()["spec"]["versions"][0].clone();
        let mut known = vec![".metadata.creationTimestamp".to_owned()];
        walk("", &version["schema"]["openAPIV3Schema"], &mut |path, _| known.push(path.to_owned()));
        let columns = version["additionalPrinterColumns"].as_array().unwrap();
        assert!(columns.iter().any(|c| c["priority"] == 1) && columns.iter().any(|c| c["priority"].is_null()));
        for column in columns.iter().chain(version["selectableFields"].as_array().into_iter().flatten()) {
            let path = column["jsonPath"].as_str().unwrap().replace("[0]", "[]");
            assert!(known.contains(&path), "{}: {path}", manifest.file);
        }
    }
}
