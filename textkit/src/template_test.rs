//! Rendering against what Python (jinja2 3.1 with the environment of transformers) prints.

use super::*;

fn render_with(source: &str, variables: &str) -> Result<String, Failure> {
    Template::new(source)?.render(variables, 100_000)
}

fn render(source: &str) -> String {
    render_with(
        source,
        r#"{"x": 1, "none": null, "list": [1, 2.5, "a"], "dict": {"b": 1, "a": [true, null]}}"#,
    )
    .unwrap_or_else(|f| panic!("{source}: {}", f.message))
}

#[test]
fn tojson_is_json_dumps() {
    for (source, text) in [
        ("{{ dict | tojson }}", r#"{"b": 1, "a": [true, null]}"#),
        ("{{ '<a>&\\'\"é' | tojson }}", r#""<a>&'\"é""#),
        ("{{ 'é😀' | tojson(ensure_ascii=True) }}", r#""\u00e9\ud83d\ude00""#),
        ("{{ dict | tojson(sort_keys=true) }}", r#"{"a": [true, null], "b": 1}"#),
        ("{{ dict | tojson(separators=(',', ':')) }}", r#"{"b":1,"a":[true,null]}"#),
        ("{{ dict | tojson(indent=2) }}", "{\n  \"b\": 1,\n  \"a\": [\n    true,\n    null\n  ]\n}"),
        ("{{ {} | tojson(indent=2) }}{{ [] | tojson(indent=1) }}", "{}[]"),
        ("{{ [1e-7, 1e20, 2.0, -0.5] | tojson }}", "[1e-07, 1e+20, 2.0, -0.5]"),
        ("{{ {5: 2, none: 3, true: 4} | tojson }}", r#"{"5": 2, "null": 3, "true": 4}"#),
        ("{{ '\\n\\t\\x01' | tojson }}", "\"\\n\\t\\u0001\""),
    ] {
        assert_eq!(render(source), text, "{source}");
    }
    assert_eq!(render_with("{{ nothing | tojson }}", "{}").unwrap_err().status, Status::Template);
}

#[test]
fn values_print_as_in_python() {
    for (source, text) in [
        ("{{ 1e-7 }} {{ 1e20 }} {{ 2.0 }}", "1e-07 1e+20 2.0"),
        ("{{ list }} {{ dict }}", "[1, 2.5, 'a'] {'b': 1, 'a': [True, None]}"),
        ("{{ (1,) }} {{ (1, 1e20) }} {{ [] }} {{ {} }}", "(1,) (1, 1e+20) [] {}"),
        ("{{ none }} {{ true }} {{ nothing }}", "None True "),
        ("{{ 1e20 | string }}", "1e+20"),
        ("{{ [\"it's\", 'a\\nb'] }}", "[\"it's\", 'a\\nb']"),
    ] {
        assert_eq!(render(source), text, "{source}");
    }
}

#[test]
fn filters_and_tests_of_jinja2() {
    for (source, text) in [
        ("{{ '' | default('a', boolean=True) }}{{ none | default('b', true) }}", "ab"),
        ("{{ nothing | default }}{{ nothing | d('c') }}{{ '' | default('x') }}", "c"),
        ("{{ nothing | default(default_value='e') }}", "e"),
        (
            "{{ none is iterable }} {{ 'a' is iterable }} {{ 3 is iterable }} {{ [] is iterable }}",
            "False True False True",
        ),
        (
            "{{ none is sequence }} {{ 'a' is sequence }} {{ dict is sequence }} {{ 3 is sequence }}",
            "False True True False",
        ),
        ("{{ 'a\\nb\\n\\n' | indent }}|", "a\n    b\n\n|"),
        ("{{ 'a\\n\\nb' | indent(2, true, blank=true) }}|", "  a\n  \n  b|"),
        ("{{ 'a\\nb' | indent('> ', first=True) }}", "> a\n> b"),
    ] {
        assert_eq!(render(source), text, "{source}");
    }
}

#[test]
fn methods_of_python() {
    for (source, text) in [
        ("{{ 'a-b-c'.rsplit('-', 1) }} {{ 'a-b-c'.split('-', 1) }}", "['a-b', 'c'] ['a', 'b-c']"),
        (
            "{{ ' a  b '.split() }} {{ ' a  b c'.rsplit(none, 1) }} {{ ' a b c '.split(maxsplit=1) }}",
            "['a', 'b'] [' a  b', 'c'] ['a', 'b c ']",
        ),
        (
            "{{ ''.split() }} {{ ''.split('x') }} {{ 'a</think>b</think>c'.split('</think>')[-1] }}",
            "[] [''] c",
        ),
        ("{{ 'éab'.index('b') }} {{ 'abab'.rindex('a') }} {{ [3, 4].index(4) }}", "2 2 1"),
        (
            "{{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }} {{ 'a'.partition('=') }}",
            "('a', '=', 'b=c') ('a=b', '=', 'c') ('a', '', '')",
        ),
        (
            "{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'abc'.removeprefix('x') }}",
            "bc ab abc",
        ),
        (
            "{{ dict.copy() }} {{ dict.get('zz') }} {{ dict.get('zz', 5) }}",
            "{'b': 1, 'a': [True, None]} None 5",
        ),
        ("{{ '\\x1c a\\n'.strip() }}|{{ 'xxaxx'.lstrip('x') }}|{{ 'a \\n'.rstrip('\\n') }}|", "a|axx|a |"),
        ("{% for k, v in dict.items() %}{{ k }}={{ v }};{% endfor %}", "b=1;a=[True, None];"),
        ("{{ 'A b'.lower() }} {{ 'ab'.startswith('a') }} {{ 'a b'.title() }}", "a b True A B"),
    ] {
        assert_eq!(render(source), text, "{source}");
    }
    assert_eq!(render_with("{{ 'a'.index('b') }}", "{}").unwrap_err().status, Status::Template);
}

#[test]
fn blocks_and_line_ends() {
    assert_eq!(render("a\r\n  {% if true %}\r\nb\r\n  {% endif %}\rc"), "a\nb\nc");
    assert_eq!(render("x {%- generation %} y {% endgeneration -%} z"), "x y z");
    assert_eq!(
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}"),
        "13"
    );
    let loops =
        "{%- set ns = namespace(a='') -%}{%- for i in list -%}{% set ns.a = ns.a ~ i %}{%- endfor -%}";
    assert_eq!(render(&format!("{loops}{{{{ ns.a }}}}")), "12.5a");
    assert_eq!(render("{{ '{% raw %}' }}"), "{% raw %}");
}

#[test]
fn raise_exception_has_its_own_status() {
    let failure = render_with("{{ raise_exception('roles must alternate') }}", "{}").unwrap_err();
    assert_eq!((failure.status, failure.message.as_str()), (Status::Raised, "roles must alternate"));
    let failure =
        render_with("{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}", "{}").unwrap_err();
    assert_eq!((failure.status, failure.message.as_str()), (Status::Raised, "deep"));
}

#[test]
fn errors_say_where() {
    let failure = Template::new("a\n{% if %}").err().unwrap();
    assert_eq!(failure.status, Status::Parse);
    assert!(failure.message.contains("line 2"), "{}", failure.message);
    let failure = render_with("\n\n{{ a.b.c }}", "{}").unwrap_err();
    assert_eq!(failure.status, Status::Template);
    assert!(failure.message.contains("line 3"), "{}", failure.message);
    assert_eq!(render_with("a", "[").unwrap_err().status, Status::Parse);
}

#[test]
fn fuel_stops_what_does_not_end() {
    for source in [
        "{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ] {
        let failure = render_with(source, "{}").unwrap_err();
        assert!(matches!(failure.status, Status::Limit | Status::Template), "{source}: {}", failure.message);
    }
}

#[test]
fn strftime_now_gives_the_year() {
    let year: i32 = render("{{ strftime_now('%Y') }}").parse().unwrap();
    assert!((2024..3000).contains(&year));
    assert_eq!(render("{{ strftime_now('') }}"), "");
}
