//! Values as Python writes them: str(), repr() and json.dumps(). Chat templates were written against Python,
//! and a prompt that differs in one blank or digit is another prompt.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State};

/// repr(float): shortest digits; exponents below -4 and from 16 on.
pub fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    let mut buffer = ryu::Buffer::new();
    let shortest = buffer.format_finite(number);
    let (sign, shortest) = match shortest.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", shortest),
    };
    let (mantissa, exponent) = match shortest.split_once('e') {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().unwrap_or(0)),
        None => (shortest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    let digits = all.trim_start_matches('0');
    // value = 0.DIGITS * 10^point
    let point = whole.len() as i32 + exponent - (all.len() - digits.len()) as i32;
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() {
        return format!("{sign}0.0");
    }
    let n = digits.len() as i32;
    let exponent = point - 1;
    if !(-4..16).contains(&exponent) {
        let (first, rest) = digits.split_at(1);
        let dot = if rest.is_empty() { "" } else { "." };
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{first}{dot}{rest}e{exponent_sign}{:02}", exponent.abs());
    }
    if point <= 0 {
        format!("{sign}0.{}{digits}", "0".repeat(-point as usize))
    } else if point >= n {
        format!("{sign}{digits}{}.0", "0".repeat((point - n) as usize))
    } else {
        let (whole, fraction) = digits.split_at(point as usize);
        format!("{sign}{whole}.{fraction}")
    }
}

fn as_float(value: &Value) -> Option<f64> {
    if value.is_number() && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// str(value), which is also what `{{ value }}` prints.
pub fn py_str(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => append_repr(value, &mut out)?,
        _ => out = value.to_string(),
    }
    Ok(out)
}

fn append_repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => append_str_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => match as_float(value) {
            Some(number) => out.push_str(&float_repr(number)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                if count > 0 {
                    out.push_str(", ");
                }
                append_repr(&item?, out)?;
                count += 1;
            }
            if tuple && count == 1 {
                out.push(',');
            }
            out.push(if tuple { ')' } else { ']' });
        }
        // Keyword arguments, cyclers and the like print themselves.
        ValueKind::Map if value.as_object().is_some_and(|o| o.try_iter_pairs().is_some()) => {
            out.push('{');
            for (index, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                if index > 0 {
                    out.push_str(", ");
                }
                append_repr(&key, out)?;
                out.push_str(": ");
                append_repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn append_str_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c if (c as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if (c as u32) < 0x10000 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push_str(&format!("\\U{:08x}", c as u32)),
        }
    }
    out.push(quote);
}

/// str.isprintable of one character. The noncharacters U+FDD0.. count as printable: the caller marks text
/// with them.
fn is_printable(c: char) -> bool {
    match c as u32 {
        0x20..=0x7e | 0xfdd0..=0xfdef => true,
        0x7f..=0xa0
        | 0xad
        | 0x2028
        | 0x2029
        | 0x1680
        | 0x2000..=0x200f
        | 0x202a..=0x202f
        | 0x205f..=0x206f
        | 0x3000
        | 0xe000..=0xf8ff
        | 0xfeff
        | 0xfff9..=0xfffb
        | 0xe0001..=0xe007f
        | 0xf0000..=0x10ffff => false,
        _ => {
            // escape_debug also escapes combining marks when they come first: only behind a letter it tells.
            let mut pair = String::from("a");
            pair.push(c);
            !c.is_control() && !pair.escape_debug().to_string().starts_with("a\\u")
        }
    }
}

/// The keyword arguments of json.dumps that templates use.
struct JsonStyle {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter of transformers:
/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub fn tojson(state: &State, value: Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (ascii, indent, separators, sort, kwargs): (
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Kwargs,
    ) = minijinja::value::from_args(&args)?;
    let pick = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        Ok(positional.or(kwargs.get::<Option<Value>>(name)?).filter(|v| !v.is_none()))
    };
    let ensure_ascii = pick(ascii, "ensure_ascii")?;
    let indent = pick(indent, "indent")?;
    let separators = pick(separators, "separators")?;
    let sort_keys = pick(sort, "sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.as_str().unwrap_or_default().to_string()),
        Some(width) if width.kind() == ValueKind::Bool => Some(" ".repeat(width.is_true() as usize)),
        Some(width) => Some(" ".repeat(i64::try_from(width)?.clamp(0, 64) as usize)),
    };
    let mut style = JsonStyle {
        ensure_ascii: ensure_ascii.is_some_and(|v| v.is_true()),
        item_separator: if indent.is_some() { "," } else { ", " }.to_string(),
        key_separator: ": ".to_string(),
        sort_keys: sort_keys.is_some_and(|v| v.is_true()),
        indent,
    };
    if let Some(separators) = separators {
        style.item_separator = separators.get_item_by_index(0)?.to_string();
        style.key_separator = separators.get_item_by_index(1)?.to_string();
    }
    let mut out = String::new();
    append_json(&value, &style, 0, &mut out)?;
    state.consume_fuel(out.len() as u64 / 64)?;
    Ok(Value::from(out))
}

fn unserializable(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {what} is not JSON serializable"))
}

fn append_json(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) -> Result<(), Error> {
    // Values nest as deep as the request's JSON, which its parser limits; a namespace may even hold itself.
    if depth > 200 {
        return Err(unserializable("a value nested deeper than 200 levels"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => append_json_number(value, out),
        ValueKind::String => append_json_string(value.as_str().unwrap_or_default(), style.ensure_ascii, out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                append_separator(style, count, depth + 1, out);
                append_json(&item?, style, depth + 1, out)?;
                count += 1;
            }
            close(style, count, depth, ']', out);
        }
        ValueKind::Map => {
            out.push('{');
            let mut keys = value.try_iter()?.checked().collect::<Result<Vec<Value>, Error>>()?;
            if style.sort_keys {
                keys.sort();
            }
            for (count, key) in keys.iter().enumerate() {
                append_separator(style, count, depth + 1, out);
                append_json_key(key, style, out)?;
                out.push_str(&style.key_separator);
                append_json(&value.get_item(key)?, style, depth + 1, out)?;
            }
            close(style, keys.len(), depth, '}', out);
        }
        kind => return Err(unserializable(&kind.to_string())),
    }
    Ok(())
}

fn append_separator(style: &JsonStyle, count: usize, depth: usize, out: &mut String) {
    if count > 0 {
        out.push_str(&style.item_separator);
    }
    if let Some(indent) = &style.indent {
        out.push('\n');
        out.push_str(&indent.repeat(depth));
    }
}

fn close(style: &JsonStyle, count: usize, depth: usize, bracket: char, out: &mut String) {
    if let (Some(indent), true) = (&style.indent, count > 0) {
        out.push('\n');
        out.push_str(&indent.repeat(depth));
    }
    out.push(bracket);
}

fn append_json_number(value: &Value, out: &mut String) {
    match as_float(value) {
        Some(number) if number.is_nan() => out.push_str("NaN"),
        Some(number) if number.is_infinite() => {
            out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" })
        }
        Some(number) => out.push_str(&float_repr(number)),
        None => out.push_str(&value.to_string()),
    }
}

fn append_json_key(key: &Value, style: &JsonStyle, out: &mut String) -> Result<(), Error> {
    let mut text = String::new();
    match key.kind() {
        ValueKind::String => text.push_str(key.as_str().unwrap_or_default()),
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if key.is_true() { "true" } else { "false" }),
        ValueKind::Number => append_json_number(key, &mut text),
        kind => return Err(unserializable(&format!("a key of kind {kind}"))),
    }
    append_json_string(&text, style.ensure_ascii, out);
    Ok(())
}

fn append_json_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && c > '~') => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python_writes_them() {
        for (number, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00012345, "0.00012345"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e20, "1e+20"),
            (1.5e300, "1.5e+300"),
            (123456789.125, "123456789.125"),
            (9007199254740993.0, "9007199254740992.0"),
            (5e-324, "5e-324"),
            (0.1, "0.1"),
            (100.0, "100.0"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_repr(number), text);
        }
    }

    #[test]
    fn strings_as_python_represents_them() {
        for (text, repr) in [
            ("a", "'a'"),
            ("it's", "\"it's\""),
            ("it's \"x\"", "'it\\'s \"x\"'"),
            ("\n\t\\\u{1}\u{7f}\u{a0}", "'\\n\\t\\\\\\x01\\x7f\\xa0'"),
            ("é你😀\u{301}", "'é你😀\u{301}'"),
            ("\u{200b}\u{e000}\u{10ffff}", "'\\u200b\\ue000\\U0010ffff'"),
            ("\u{fdd0}", "'\u{fdd0}'"),
        ] {
            let mut out = String::new();
            append_str_repr(text, &mut out);
            assert_eq!(out, repr);
        }
    }
}
