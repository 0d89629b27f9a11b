package config

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"
)

// YAML writes the configuration, defaults included, in the form Load reads.
func (c *Config) YAML() ([]byte, error) {
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(node(reflect.ValueOf(*c))); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return b.Bytes(), nil
}

// node makes a mapping of a struct, keys in the struct's order. Empty lists
// and absent mappings are left out.
func node(v reflect.Value) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, f := range fieldsOf(v.Type()) {
		fv := v.Field(f.index)
		var val *yaml.Node
		switch fv.Kind() {
		case reflect.Struct:
			val = node(fv)
		case reflect.Pointer:
			if fv.IsNil() {
				continue
			}
			val = node(fv.Elem())
			dropPeerLimits(val)
		case reflect.Slice:
			if fv.Len() == 0 {
				continue
			}
			val = list(fv)
		default:
			val = scalarNode(f, fv)
		}
		n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: f.key}, val)
	}
	return n
}

// dropPeerLimits removes what a group may not set from its mapping of limits.
// No other mapping behind a pointer has those keys.
func dropPeerLimits(n *yaml.Node) {
	for i := 0; i < len(n.Content); i += 2 {
		if slices.Contains(peerLimits, n.Content[i].Value) {
			n.Content = slices.Delete(n.Content, i, i+2)
			i -= 2
		}
	}
}

func list(v reflect.Value) *yaml.Node {
	n := &yaml.Node{Kind: yaml.SequenceNode}
	for i := range v.Len() {
		n.Content = append(n.Content, node(v.Index(i)))
	}
	return n
}

func scalarNode(f field, v reflect.Value) *yaml.Node {
	n := &yaml.Node{}
	switch {
	case f.typ == durationType:
		n.SetString(FormatDuration(time.Duration(v.Int())))
	case f.size && v.Int() != 0:
		n.SetString(FormatSize(v.Int()))
	case v.Kind() == reflect.String:
		n.SetString(v.String())
		if v.Len() == 0 || !plain(v.String()) {
			n.Style = yaml.DoubleQuotedStyle
		}
	default:
		n.Kind, n.Value = yaml.ScalarNode, fmt.Sprint(v.Interface())
	}
	return n
}

// plain reports a text that YAML reads as text without quotes.
func plain(s string) bool {
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(s), &n); err != nil || len(n.Content) != 1 {
		return false
	}
	c := n.Content[0]
	return c.Kind == yaml.ScalarNode && c.ShortTag() == "!!str" && c.Value == s
}
