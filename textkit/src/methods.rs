//! Python methods of strings, lists and dicts that templates call. What is not here falls through to
//! minijinja-contrib's pycompat. Blank means blank to Python: U+001C..U+001F too.

use minijinja::value::{from_args, Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

pub fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let result = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, args),
        ValueKind::Map if method == "copy" => from_args::<()>(args).map(|()| Some(value.clone())),
        ValueKind::Seq if method == "index" => list_index(value, args).map(Some),
        ValueKind::Seq if method == "copy" => from_args::<()>(args).map(|()| Some(value.clone())),
        _ => Ok(None),
    };
    match result? {
        Some(found) => Ok(found),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn not_found(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.to_string())
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "strip" | "lstrip" | "rstrip" => strip(text, method, args)?,
        "split" => split(text, args, Side::Left)?,
        "rsplit" => split(text, args, Side::Right)?,
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(is_blank))
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(what) } else { text.rfind(what) };
            let at = at.ok_or_else(|| not_found("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(not_found("empty separator"));
            }
            let parts = if method == "partition" {
                text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b])
            } else {
                text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b])
            };
            Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn strip(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (chars,): (Option<Value>,) = from_args(args)?;
    let chars: Option<Vec<char>> = match chars.filter(|c| !c.is_none()) {
        None => None,
        Some(chars) => {
            let set = chars.as_str().ok_or_else(|| not_found("strip: the argument must be a string"))?;
            Some(set.chars().collect())
        }
    };
    let drop = |c: char| chars.as_ref().map_or_else(|| is_blank(c), |set| set.contains(&c));
    Ok(Value::from(match method {
        "strip" => text.trim_matches(drop),
        "lstrip" => text.trim_start_matches(drop),
        _ => text.trim_end_matches(drop),
    }))
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

/// str.split and str.rsplit (sep=None, maxsplit=-1).
fn split(text: &str, args: &[Value], side: Side) -> Result<Value, Error> {
    let (separator, limit, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(kwargs.get("sep")?).filter(|s| !s.is_none());
    let limit = limit.or(kwargs.get("maxsplit")?).unwrap_or(-1);
    kwargs.assert_all_used()?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let parts: Vec<&str> = match &separator {
        None => split_blank(text, limit, side),
        Some(separator) => {
            let separator =
                separator.as_str().ok_or_else(|| not_found("split: the separator must be a string"))?;
            if separator.is_empty() {
                return Err(not_found("empty separator"));
            }
            if side == Side::Left {
                text.splitn(limit.saturating_add(1), separator).collect()
            } else {
                let mut parts: Vec<&str> = text.rsplitn(limit.saturating_add(1), separator).collect();
                parts.reverse();
                parts
            }
        }
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn split_blank(text: &str, limit: usize, side: Side) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if side == Side::Left {
            rest.trim_start_matches(is_blank)
        } else {
            rest.trim_end_matches(is_blank)
        };
        if rest.is_empty() {
            break;
        }
        if parts.len() == limit {
            parts.push(rest);
            break;
        }
        let (part, remaining) = if side == Side::Left {
            rest.split_at(rest.find(is_blank).unwrap_or(rest.len()))
        } else {
            let blank = rest.char_indices().rev().find(|(_, c)| is_blank(*c));
            let (remaining, part) = rest.split_at(blank.map_or(0, |(at, c)| at + c.len_utf8()));
            (part, remaining)
        };
        parts.push(part);
        rest = remaining;
    }
    if side == Side::Right {
        parts.reverse();
    }
    parts
}

fn list_index(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let (what,): (&Value,) = from_args(args)?;
    for (index, item) in value.try_iter()?.checked().enumerate() {
        if item? == *what {
            return Ok(Value::from(index));
        }
    }
    Err(not_found("value is not in list"))
}
