//! Rust text as tidy reads it: code apart from comments, literals emptied, braces followed over lines.
//!
//! Invariant: what stands in a string, a char or a comment never counts as code; a lifetime opens no literal. It knows
//! tokens, not grammar: what a macro makes is not seen.

#[derive(Clone, Copy, PartialEq)]
enum Within {
    Code,
    LineComment,
    BlockComment(usize),
    Text,
    RawText(usize),
}

/// One source line: its code with the content of literals taken out, and its comments.
#[derive(Default)]
pub(crate) struct Line {
    pub(crate) code: String,
    pub(crate) comment: String,
}

pub(crate) fn is_ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// How many characters open a string, char or comment at `i`, and what lies behind them.
fn opening(s: &[char], i: usize) -> Option<(usize, Within)> {
    let at = |k: usize| s.get(i + k).copied().unwrap_or('\n');
    match (at(0), at(1)) {
        ('/', '/') => return Some((2, Within::LineComment)),
        ('/', '*') => return Some((2, Within::BlockComment(1))),
        ('"', _) => return Some((1, Within::Text)),
        _ => {}
    }
    let raw_prefix = match (i > 0).then(|| s[i - 1]) {
        Some('b' | 'c') => i < 2 || !is_ident(s[i - 2]),
        Some(before) => !is_ident(before),
        None => true,
    };
    if at(0) == 'r' && raw_prefix {
        let hashes = s[i + 1..].iter().take_while(|c| **c == '#').count();
        if at(1 + hashes) == '"' {
            return Some((2 + hashes, Within::RawText(hashes)));
        }
    }
    if at(0) == '\'' && (at(1) == '\\' || at(2) == '\'') {
        // A char literal; anything else after ' is a lifetime.
        let from = if at(1) == '\\' { 3 } else { 2 };
        let close = s[i + from..].iter().position(|c| *c == '\'')?;
        return Some((from + close + 1, Within::Code));
    }
    None
}

/// How many characters to go on by inside a string or a block comment at `i`, and where that leads.
fn inside(s: &[char], i: usize, within: Within) -> (usize, Within) {
    let next = s.get(i + 1).copied();
    match within {
        Within::Text if s[i] == '\\' && next != Some('\n') => (2, within),
        Within::Text if s[i] == '"' => (1, Within::Code),
        Within::RawText(n) if s[i] == '"' && s[i + 1..].iter().take(n).filter(|c| **c == '#').count() == n => {
            (1 + n, Within::Code)
        }
        Within::BlockComment(depth) if s[i] == '/' && next == Some('*') => (2, Within::BlockComment(depth + 1)),
        Within::BlockComment(1) if s[i] == '*' && next == Some('/') => (2, Within::Code),
        Within::BlockComment(depth) if s[i] == '*' && next == Some('/') => (2, Within::BlockComment(depth - 1)),
        _ => (1, within),
    }
}

pub(crate) fn split(text: &str) -> Vec<Line> {
    let s: Vec<char> = text.chars().collect();
    let (mut lines, mut within, mut i) = (vec![Line::default()], Within::Code, 0);
    while i < s.len() {
        if s[i] == '\n' {
            lines.push(Line::default());
            within = if within == Within::LineComment { Within::Code } else { within };
            i += 1;
            continue;
        }
        let line = lines.last_mut().unwrap();
        let (step, then) = match within {
            Within::Code => opening(&s, i).unwrap_or_else(|| {
                line.code.push(s[i]);
                (1, Within::Code)
            }),
            Within::LineComment => (1, within),
            _ => inside(&s, i, within),
        };
        if matches!(within, Within::LineComment | Within::BlockComment(_)) {
            line.comment.push(s[i]);
        }
        i += step;
        within = then;
    }
    lines
}

/// The code as characters with their line (from 0), to follow braces over lines.
pub(crate) fn code_chars(lines: &[Line]) -> Vec<(char, usize)> {
    let with_line = |(n, l): (usize, &Line)| l.code.chars().chain(['\n']).map(|c| (c, n)).collect::<Vec<_>>();
    lines.iter().enumerate().flat_map(with_line).collect()
}

/// The index of the `{` that opens the item starting at `from`, and of its `}`; `None` if it ends with `;` first.
pub(crate) fn body(s: &[(char, usize)], from: usize) -> Option<(usize, usize)> {
    let mut depth = 0usize;
    let open = (from..s.len()).find(|i| match s[*i].0 {
        '(' | '[' => {
            depth += 1;
            false
        }
        ')' | ']' => {
            depth = depth.saturating_sub(1);
            false
        }
        '{' | ';' => depth == 0,
        _ => false,
    })?;
    if s[open].0 == ';' {
        return None;
    }
    let mut braces = 0usize;
    let close = (open..s.len()).find(|i| {
        match s[*i].0 {
            '{' => braces += 1,
            '}' => braces -= 1,
            _ => {}
        }
        braces == 0
    })?;
    Some((open, close))
}

/// Where `pattern` stands in the code, not as part of a longer word.
pub(crate) fn find_word(s: &[(char, usize)], pattern: &str) -> Vec<usize> {
    let p: Vec<char> = pattern.chars().collect();
    let whole = |i: usize| {
        (i == 0 || !is_ident(s[i - 1].0) || !is_ident(p[0]))
            && (!is_ident(p[p.len() - 1]) || s.get(i + p.len()).is_none_or(|c| !is_ident(c.0)))
    };
    let same = |w: &[(char, usize)]| w.iter().map(|c| c.0).eq(p.iter().copied());
    s.windows(p.len()).enumerate().filter(|(i, w)| same(w) && whole(*i)).map(|(i, _)| i).collect()
}

/// First and last line (from 0) of everything under `#[cfg(test)]`, and the files that such a `mod name;` names.
pub(crate) fn test_parts(path: &str, text: &str) -> (Vec<(usize, usize)>, Vec<String>) {
    let s = code_chars(&split(text));
    let (mut regions, mut files) = (Vec::new(), Vec::new());
    for i in find_word(&s, "#[cfg(test)]").into_iter().chain(find_word(&s, "#[cfg(all(test")) {
        if let Some((_, close)) = body(&s, i) {
            regions.push((s[i].1, s[close].1));
        } else {
            let item: String = s[i..].iter().map(|c| c.0).take_while(|c| *c != ';').collect();
            let words: Vec<&str> = item.split_whitespace().collect();
            if let [.., "mod", name] = words[..] {
                files.push(format!("{}{name}", module_folder(path)));
            }
        }
    }
    (regions, files)
}

/// The folder, with a slash at its end, in which the modules of the file at `path` lie.
fn module_folder(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    match name {
        "lib.rs" | "main.rs" => format!("{folder}/"),
        _ => format!("{folder}/{}/", name.trim_end_matches(".rs")),
    }
}
