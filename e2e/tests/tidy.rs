//! Tidy: the style of the tree as tests. Each check is a function from a file's text to its faults, so that the last
//! tests can plant every fault and see it found.
//!
//! Invariant: what a check calls a fault is a fault in every file; exceptions are written beside the code, with their
//! reason (`// long: why` above a function, `// sleep: why` above an awaited sleep), never in a list here.
//!
//! Reads what `git ls-files` names; without git (a release tarball) it walks the folders.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "tidy/dependencies.rs"]
mod dependencies;
#[path = "tidy/rust_text.rs"]
mod rust_text;

use dependencies::{CLIENT_MUST_NOT_USE, OTHER_TARGET, PROTOCOL_MAY_USE, metadata, platform_dependencies, stands_on};
use rust_text::{Line, body, code_chars, find_word, is_ident, split, test_parts};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_COMMENT_COLUMNS: usize = 130;
const MAX_PROTOCOL_MD_COLUMNS: usize = 100;

// ---- the tree ----

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Paths of all files of the project, relative to its root, with `/`.
fn tracked() -> Vec<String> {
    let out = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let mut paths: Vec<String> = match out {
        Ok(o) if o.status.success() && !o.stdout.is_empty() => {
            String::from_utf8(o.stdout).unwrap().split('\0').filter(|p| !p.is_empty()).map(str::to_owned).collect()
        }
        _ => walk(&root(), ""),
    };
    // Deleted but not yet committed: no longer part of the tree.
    paths.retain(|p| root().join(p).is_file());
    paths.sort();
    paths
}

fn walk(dir: &Path, prefix: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let path = format!("{prefix}{name}");
        if entry.file_type().unwrap().is_dir() {
            if !matches!(name.as_str(), "target" | ".git" | ".demo") {
                paths.extend(walk(&entry.path(), &format!("{path}/")));
            }
        } else {
            paths.push(path);
        }
    }
    paths
}

/// (path, text) of every tracked text file; what is not UTF-8 (images, captured frames) has no style.
fn text_files() -> Vec<(String, String)> {
    let read = |p: String| fs::read_to_string(root().join(&p)).ok().map(|text| (p, text));
    let files: Vec<_> = tracked().into_iter().filter_map(read).collect();
    assert!(files.len() > 20, "only {} files found: the checks would prove nothing", files.len());
    files
}

/// (path, text) of every Rust file written by people.
fn rust_files() -> Vec<(String, String)> {
    let files: Vec<_> = text_files().into_iter().filter(|(p, t)| p.ends_with(".rs") && !is_generated(p, t)).collect();
    assert!(files.len() > 5, "only {} Rust files found: the checks would prove nothing", files.len());
    files
}

fn is_generated(path: &str, text: &str) -> bool {
    let folder = |name: &str| path.split('/').any(|part| part == name);
    let mark = concat!("@gener", "ated");
    folder("golden") || folder("generated") || text.lines().take(5).any(|l| l.contains(mark))
}

/// Fails with all faults of all files, one a line.
fn demand_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

fn check_rust(check: impl Fn(&str, &str) -> Vec<String>) {
    demand_none(rust_files().iter().flat_map(|(p, t)| check(p, t)).collect());
}

fn check_text(check: impl Fn(&str, &str) -> Vec<String>) {
    demand_none(text_files().iter().flat_map(|(p, t)| check(p, t)).collect());
}

// ---- the checks ----

fn opens_with_its_purpose(path: &str, text: &str) -> Vec<String> {
    let ok = text.lines().next().is_some_and(|l| l.strip_prefix("//! ").is_some_and(|rest| !rest.trim().is_empty()));
    if ok { vec![] } else { vec![format!("{path}:1: does not open with //! and what it is")] }
}

fn is_short_enough(path: &str, text: &str) -> Vec<String> {
    let n = text.lines().count();
    if n <= MAX_FILE_LINES { vec![] } else { vec![format!("{path}: {n} lines, the limit is {MAX_FILE_LINES}")] }
}

fn long_functions(path: &str, text: &str) -> Vec<String> {
    let lines = split(text);
    let s = code_chars(&lines);
    let mut faults = Vec::new();
    for i in find_word(&s, "fn") {
        let name: String =
            s[i + 2..].iter().map(|c| c.0).skip_while(|c| *c == ' ').take_while(|c| is_ident(*c)).collect();
        let Some((_, close)) = body(&s, i).filter(|_| !name.is_empty()) else { continue };
        let (first, last) = (s[i].1, s[close].1);
        let length = last - first + 1;
        if length > MAX_FUNCTION_LINES && !has_reason_above(&lines, first, "long:") {
            faults
                .push(format!("{path}:{}: fn {name} has {length} lines, the limit is {MAX_FUNCTION_LINES}", first + 1));
        }
    }
    faults
}

/// A comment `// word reason` on the line or on the comments and attributes right above it.
fn has_reason_above(lines: &[Line], at: usize, word: &str) -> bool {
    let above = lines[..at].iter().rev().take_while(|l| {
        let code = l.code.trim();
        (code.is_empty() && !l.comment.is_empty()) || code.starts_with("#[") || code.ends_with(")]")
    });
    let gives = |l: &Line| l.comment.trim().strip_prefix(word).is_some_and(|reason| !reason.trim().is_empty());
    gives(&lines[at]) || above.into_iter().any(gives)
}

fn long_lines(path: &str, text: &str, limit: usize) -> Vec<String> {
    let widths = text.lines().enumerate().map(|(n, l)| (n + 1, l.chars().count()));
    widths.filter(|(_, w)| *w > limit).map(|(n, w)| format!("{path}:{n}: {w} columns, the limit is {limit}")).collect()
}

fn unfinished(path: &str, text: &str) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!")];
    let has = |l: &str| marks.iter().any(|m| has_word(l, m));
    text.lines().enumerate().filter(|(_, l)| has(l)).map(|(n, l)| format!("{path}:{}: {}", n + 1, l.trim())).collect()
}

/// `word` stands in `line`, not as part of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        !before.chars().next_back().is_some_and(is_ident)
            && (word.ends_with('!') || !after.chars().next().is_some_and(is_ident))
    })
}

/// Absolute paths of the machines on which the project was made; folders of the same name elsewhere are none.
fn machine_paths(path: &str, text: &str) -> Vec<String> {
    let starts = [concat!("/wo", "rk/"), concat!("/fa", "rm/")];
    let absolute = |l: &str, start: &str| {
        l.match_indices(start).any(|(at, _)| {
            !l[..at]
                .chars()
                .next_back()
                .is_some_and(|c| is_ident(c) || matches!(c, '.' | '-' | '/' | '}' | ')' | '~' | '@'))
        })
    };
    let has = |l: &str| starts.iter().any(|start| absolute(l, start));
    text.lines().enumerate().filter(|(_, l)| has(l)).map(|(n, l)| format!("{path}:{}: {}", n + 1, l.trim())).collect()
}

/// Sleeps in what ships: only where no event can come, with `// sleep: why` above.
fn sleeps(path: &str, text: &str) -> Vec<String> {
    let lines = split(text);
    let (tests, _) = test_parts(path, text);
    let s = code_chars(&lines);
    let mut faults = Vec::new();
    for i in find_word(&s, "sleep") {
        let before: String = s[..i].iter().rev().map(|c| c.0).take(8).collect::<String>().chars().rev().collect();
        let n = s[i].1;
        let is_call = s.get(i + 5).is_some_and(|c| c.0 == '(') && !before.ends_with('.') && !before.ends_with("fn ");
        let excused = has_reason_above(&lines, n, "sleep:");
        if is_call && !excused && !tests.iter().any(|(first, last)| (*first..=*last).contains(&n)) {
            faults.push(format!("{path}:{}: sleeps; wait for the event or arm a timer", n + 1));
        }
    }
    faults
}

fn ignored_without_reason(path: &str, text: &str) -> Vec<String> {
    let bare = |code: &str, raw: &str| {
        let at_attribute = code.match_indices("#[ignore").map(|(at, m)| &code[at + m.len()..]);
        let at_cfg =
            code.match_indices(", ignore").filter(|_| code.contains("cfg_attr(")).map(|(at, m)| &code[at + m.len()..]);
        at_attribute.chain(at_cfg).any(|rest| !rest.trim_start().starts_with('=') || raw.contains("= \"\""))
    };
    let rows = split(text).into_iter().zip(text.lines()).enumerate();
    rows.filter(|(_, (l, raw))| bare(&l.code, raw))
        .map(|(n, _)| format!("{path}:{}: ignore without a reason", n + 1))
        .collect()
}

/// Words of the form of a rule's id: H7, H11c, R10, M2, I4.
fn rule_ids(text: &str) -> Vec<String> {
    let is_id = |w: &&str| {
        let digits = w.get(1..).unwrap_or("").trim_end_matches(['a', 'b', 'c']);
        let suffix = w.len().saturating_sub(1 + digits.len());
        w.starts_with(['H', 'R', 'M', 'I'])
            && matches!(digits.len(), 1..=2)
            && digits.bytes().all(|b| b.is_ascii_digit())
            && suffix <= 1
    };
    text.split(|c: char| !is_ident(c)).filter(is_id).map(str::to_owned).collect()
}

fn unknown_rules(path: &str, text: &str, known: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    for (n, line) in split(text).iter().enumerate() {
        let cited = rule_ids(&line.comment).into_iter().filter(|id| !known.contains(id));
        faults.extend(cited.map(|id| format!("{path}:{}: cites {id}, which PROTOCOL.md does not have", n + 1)));
    }
    faults
}

fn linux_only(path: &str, text: &str) -> Vec<String> {
    let marks = ["os::linux", "target_os = \"linux\"", "/proc/self", "/sys/"];
    let has = |l: &str| marks.iter().any(|m| l.contains(m));
    text.lines().enumerate().filter(|(_, l)| has(l)).map(|(n, l)| format!("{path}:{}: {}", n + 1, l.trim())).collect()
}

// ---- PROTOCOL.md ----

fn protocol_md() -> String {
    fs::read_to_string(root().join("PROTOCOL.md")).expect("PROTOCOL.md is part of the tree")
}

/// The ids of the anchors, `h7` as `H7`.
fn anchored_rules(markdown: &str) -> BTreeSet<String> {
    let anchor = |part: &str| part.split_once('"').map(|(id, _)| id[..1].to_uppercase() + &id[1..]);
    let ids = markdown.split("<a id=\"").skip(1).filter_map(anchor);
    ids.filter(|id| rule_ids(id).len() == 1).collect()
}

/// The slug of a heading as forges make it: lower case, words joined by a hyphen, punctuation gone.
fn slug(heading: &str) -> String {
    let kept = heading.to_lowercase().chars().filter(|c| is_ident(*c) || matches!(c, ' ' | '-')).collect::<String>();
    kept.trim().replace(' ', "-")
}

fn dead_links(markdown: &str) -> Vec<String> {
    let headings = markdown.lines().filter(|l| l.starts_with('#')).map(|l| slug(l.trim_start_matches('#')));
    let anchors = markdown.split("<a id=\"").skip(1).filter_map(|p| p.split_once('"')).map(|(id, _)| id.to_owned());
    let targets: BTreeSet<String> = headings.chain(anchors).collect();
    let links = markdown.split("](#").skip(1).filter_map(|p| p.split_once(')')).map(|(id, _)| id.to_owned());
    links.filter(|l| !targets.contains(l)).collect()
}

// ---- the invariants ----

/// Where each of I1 to I8 has a test named for it.
const LEVELS: [(&str, &[&str]); 3] = [
    ("state machines", &["protocol/src/"]),
    ("simulator", &["e2e/tests/oracles.rs"]),
    ("processes", &["storage-node/tests/", "e2e/bench/tests/"]),
];

/// The invariants in the names of tests: `i4_i5_what_holds` is of I4 and of I5.
fn invariants_tested(text: &str) -> BTreeSet<String> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_test = |attribute: &str| attribute.starts_with("#[test]") || attribute.starts_with("#[tokio::test");
    let named = lines.windows(2).filter(|pair| is_test(pair[0])).filter_map(|pair| pair[1].split_once("fn "));
    let words = named.flat_map(|(_, name)| name.split(['_', '(']));
    words.map(str::to_uppercase).filter(|word| word.starts_with('I') && rule_ids(word).len() == 1).collect()
}

// ---- the guarantees ----

#[test]
fn every_rust_file_opens_with_its_purpose() {
    check_rust(opens_with_its_purpose);
}

#[test]
fn no_rust_file_is_over_600_lines() {
    check_rust(is_short_enough);
}

#[test]
fn no_function_is_over_70_lines_without_a_reason() {
    check_rust(long_functions);
}

#[test]
fn no_comment_is_over_130_columns() {
    // Code is kept to 120 by rustfmt, which leaves only texts that cannot be broken; it does not wrap comments.
    let comments = |t: &str| {
        let is_comment = |l: &&str| l.trim_start().starts_with("//");
        t.lines().map(|l| if is_comment(&l) { l } else { "" }).collect::<Vec<_>>().join("\n")
    };
    check_rust(|p, t| long_lines(p, &comments(t), MAX_COMMENT_COLUMNS));
}

#[test]
fn no_module_hides_in_a_mod_rs() {
    demand_none(tracked().into_iter().filter(|p| p.ends_with("/mod.rs")).collect());
}

#[test]
fn nothing_is_left_to_be_done_in_comments() {
    check_text(|p, t| if p.ends_with("go.sum") { vec![] } else { unfinished(p, t) });
}

#[test]
fn no_product_code_sleeps() {
    let files = rust_files();
    let of_tests: Vec<String> = files.iter().flat_map(|(p, t)| test_parts(p, t).1).collect();
    let is_test = |p: &str| {
        of_tests.iter().any(|m| p.strip_prefix(m.as_str()).is_some_and(|rest| rest == ".rs" || rest.starts_with('/')))
    };
    let ships = |p: &str| p.contains("/src/") && !p.starts_with("e2e/") && !is_test(p);
    demand_none(files.iter().filter(|(p, _)| ships(p)).flat_map(|(p, t)| sleeps(p, t)).collect());
}

#[test]
fn no_path_of_a_build_machine_is_named() {
    check_text(machine_paths);
}

#[test]
fn every_ignored_test_says_why() {
    check_rust(ignored_without_reason);
}

#[test]
fn the_documents_are_there() {
    let wanted = ["README.md", "ARCHITECTURE.md", "PROTOCOL.md", "CHANGELOG.md", "LICENSE"];
    let size = |name: &str| fs::metadata(root().join(name)).map_or(0, |m| m.len());
    demand_none(wanted.iter().filter(|n| size(n) < 100).map(|n| format!("{n}: missing or empty")).collect());
}

#[test]
fn the_first_screen_of_the_readme_says_what_is_not_safe() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let screen = readme.lines().take(24).collect::<Vec<_>>().join(" ");
    assert!(screen.contains("Traffic is not yet encrypted or authenticated"), "{screen}");
}

/// Helm never takes away what lies in `crds/`, nor an object that says so; everything else goes with the programs.
#[test]
fn helm_uninstall_keeps_every_object_that_stands_for_data_and_says_how_to_remove_it() {
    let templates = tracked().into_iter().filter(|p| p.starts_with("charts/lamina/templates/"));
    let texts: Vec<String> = templates.map(|p| fs::read_to_string(root().join(p)).unwrap()).collect();
    let objects = || texts.iter().flat_map(|text| text.split("\n---"));
    let ours: Vec<&str> = objects().filter(|object| object.contains("apiVersion: lamina.dev/")).collect();
    assert_eq!(ours.len(), 2, "policies and servers: {ours:#?}");
    assert!(ours.iter().all(|object| object.contains("helm.sh/resource-policy: keep")), "{ours:#?}");
    assert!(!objects().any(|object| object.contains("kind: CustomResourceDefinition")));
    let notes = texts.iter().find(|text| text.contains("helm uninstall removes the programs")).unwrap();
    for kind in ["volumes", "storageservers", "replicationpolicies", "crd"] {
        assert!(notes.lines().any(|line| line.contains("kubectl delete") && line.contains(kind)), "{kind}");
    }
    // Without the programs nobody would take the volumes' finalizers away.
    let place = |text: &str| notes.find(text).unwrap_or_else(|| panic!("{text}"));
    assert!(place("kubectl delete volumes") < place("  helm uninstall"), "{notes}");
    assert!(place("  helm uninstall") < place("kubectl delete crd"), "{notes}");
}

#[test]
fn every_cited_rule_exists_in_protocol_md() {
    let known = anchored_rules(&protocol_md());
    check_rust(|p, t| unknown_rules(p, t, &known));
}

#[test]
fn protocol_md_keeps_every_rule_and_every_link() {
    let markdown = protocol_md();
    let numbered = |letter: char, last: u32| (1..=last).map(move |n| format!("{letter}{n}"));
    let wanted = numbered('I', 9).chain(numbered('H', 24)).chain(numbered('M', 8)).chain(numbered('R', 16));
    let wanted: BTreeSet<String> =
        wanted.chain(["H3b", "H11b", "H11c"].map(str::to_owned)).filter(|id| id != "R4").collect();
    assert_eq!(anchored_rules(&markdown), wanted);
    demand_none(dead_links(&markdown));
    demand_none(long_lines("PROTOCOL.md", &markdown, MAX_PROTOCOL_MD_COLUMNS));
}

#[test]
fn every_invariant_has_a_test_named_for_it_at_each_level() {
    let files = rust_files();
    for (level, paths) in LEVELS {
        let of_level = files.iter().filter(|(path, _)| paths.iter().any(|start| path.starts_with(start)));
        let tested: BTreeSet<String> = of_level.flat_map(|(_, text)| invariants_tested(text)).collect();
        let missing = (1..=8).map(|n| format!("I{n}")).filter(|id| !tested.contains(id));
        demand_none(missing.map(|id| format!("{level}: no test is named for {id}")).collect());
    }
    let text = "#[test]\nfn i4_i5_x() {}\n#[tokio::test(flavor = \"y\")]\nasync fn a_is_i6() {}\nfn i7_no_test() {}";
    assert_eq!(invariants_tested(text), ["I4", "I5", "I6"].map(str::to_owned).into());
}

#[test]
fn protocol_stands_on_the_short_list_only() {
    let metadata = metadata(None);
    let used = stands_on(&metadata, "lamina-protocol");
    demand_none(used.into_iter().filter(|n| !PROTOCOL_MAY_USE.contains(&n.as_str())).collect());
    demand_none(platform_dependencies(&metadata, "lamina-protocol"));
}

#[test]
fn client_stands_on_nothing_of_one_system() {
    let everywhere = metadata(None);
    assert!(stands_on(&everywhere, "lamina-storage-node").contains("io-uring"), "the search finds nothing");
    let used = stands_on(&everywhere, "lamina-client");
    demand_none(used.into_iter().filter(|n| CLIENT_MUST_NOT_USE.contains(&n.as_str())).collect());
    demand_none(platform_dependencies(&everywhere, "lamina-client"));
    let elsewhere = stands_on(&metadata(Some(OTHER_TARGET)), "lamina-client");
    assert!(!elsewhere.contains("libc"), "lamina-client needs libc on {OTHER_TARGET}");
}

#[test]
fn protocol_and_client_name_no_linux_interface() {
    let portable = |p: &str| p.starts_with("protocol/src/") || p.starts_with("client/src/");
    demand_none(rust_files().iter().filter(|(p, _)| portable(p)).flat_map(|(p, t)| linux_only(p, t)).collect());
}

// ---- the checks find what they are for ----

/// A function of `lines` lines with braces in literals that must not count.
fn function_of(lines: usize) -> String {
    format!(
        "fn f<'a>(x: [u8; 2]) {{\n    g('{{', \"}}\", r#\"\"}}\"#); /* }} */\n{}}}\n",
        "    // }\n".repeat(lines - 3)
    )
}

#[test]
fn a_planted_fault_is_found_and_its_neighbour_is_not() {
    let count = |check: fn(&str, &str) -> Vec<String>, text: &str| check("a/src/b.rs", text).len();
    assert_eq!(count(opens_with_its_purpose, "// x\n"), 1);
    assert_eq!(count(opens_with_its_purpose, "//! What it is.\n"), 0);
    assert_eq!(count(is_short_enough, &"x\n".repeat(601)), 1);
    assert_eq!(count(is_short_enough, &"x\n".repeat(600)), 0);
    assert_eq!(count(long_functions, &function_of(71)), 1);
    assert_eq!(count(long_functions, &function_of(70)), 0);
    assert_eq!(count(long_functions, &format!("// long: a flat table\n#[inline]\n{}", function_of(71))), 0);
    assert_eq!(count(long_functions, &format!("// long:\n{}", function_of(71))), 1);
    assert_eq!(long_lines("a", &"é".repeat(121), 120).len(), 1);
    assert_eq!(long_lines("a", &"é".repeat(120), 120).len(), 0);
    for mark in [concat!("TO", "DO: x"), concat!("// FIX", "ME"), concat!("to", "do!()")] {
        assert_eq!(count(unfinished, mark), 1, "{mark}");
    }
    assert_eq!(count(unfinished, concat!("METHO", "TO", "DO and mastodons")), 0);
    assert_eq!(count(machine_paths, concat!("\"/wo", "rk/x\"")), 1);
    assert_eq!(count(machine_paths, concat!("{dir}/wo", "rk/x, a/wo", "rk/")), 0);
    assert_eq!(count(ignored_without_reason, "#[ignore]\n#[cfg_attr(miri, ignore)]\n#[ignore = \"\"]"), 3);
    assert_eq!(count(ignored_without_reason, "#[ignore = \"needs ublk\"]\n// #[ignore]"), 0);
    assert_eq!(count(linux_only, "use std::os::linux::fs;"), 1);
}

#[test]
fn a_sleep_is_found_only_in_what_ships() {
    let count = |text: &str| sleeps("a/src/b.rs", text).len();
    assert_eq!(count("fn f() { std::thread::sleep(D); }"), 1);
    assert_eq!(count("async fn f() { tokio::time::sleep(D).await; }"), 1);
    assert_eq!(count("// sleep: the API server gives no event\nsleep(D).await;"), 0);
    assert_eq!(count("// sleep: no event\nthread::sleep(D);"), 0);
    assert_eq!(count("#[cfg(test)]\nmod tests {\n fn f() { thread::sleep(D); }\n}\n"), 0);
    assert_eq!(count("#[cfg(test)]\nmod tests {\n}\nfn f() { thread::sleep(D); }\n"), 1);
    assert_eq!(count("fn sleep(d: D) {}\nlet s = \"sleep(1)\"; // sleep(1)\nsleep_until(t);"), 0);
    assert_eq!(test_parts("a/src/b.rs", "#[cfg(test)]\nmod tests;\n").1, ["a/src/b/tests"]);
    assert_eq!(test_parts("a/src/lib.rs", "#[cfg(test)]\npub(crate) mod world;\n").1, ["a/src/world"]);
}

#[test]
fn an_unknown_rule_is_found_in_comments_only() {
    let known = anchored_rules("<a id=\"h7\"></a><a id=\"h11c\"></a><a id=\"top\"></a>");
    assert_eq!(known.iter().collect::<Vec<_>>(), ["H11c", "H7"]);
    let faults = unknown_rules("a.rs", "//! H7, H11c's, (H8)\nlet m = M9; let s = \"R3\"; // R4, I123, xH9\n", &known);
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert_eq!(dead_links("# A b: c\n[x](#a-b-c) [y](#gone)"), ["gone"]);
}
