// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// figure is one picture: panels that share their axes.
type figure struct {
	file, title, subtitle, yLabel string
	key                           key     // its target is "" if the picture shows several
	divisor                       float64 // of the metric's unit to that of the y axis
	logY                          bool
	panels                        []panel
}

// panel is one target.
type panel struct {
	title string // "" for the only one
	lines []trace
}

// trace is one mode in a panel.
type trace struct {
	mode   string
	style  lineStyle
	points []point
	// endsEarly says that the ladder goes on where the mode was skipped.
	endsEarly bool
}

// logRange is the ratio of largest to smallest median from which on the y axis is logarithmic.
const logRange = 30

type point struct {
	services    float64
	y, low, top float64 // in the metric's unit
	hasInterval bool
}

// lineStyle is a Style with everything chosen.
type lineStyle struct {
	color  color.NRGBA
	dash   []vg.Length
	marker draw.GlyphDrawer
	width  vg.Length
	floor  bool
}

// The palette of Okabe and Ito, without the yellow that white paper swallows.
var palette = []string{"#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"}

var dashes = map[string][]vg.Length{
	"solid":   nil,
	"dash":    {6, 3},
	"dot":     {1.5, 2.5},
	"dashdot": {7, 2.5, 1.5, 2.5},
}

var markers = map[string]draw.GlyphDrawer{
	"circle": draw.CircleGlyph{}, "square": draw.SquareGlyph{}, "triangle": draw.TriangleGlyph{}, "pyramid": draw.PyramidGlyph{},
	"cross": draw.CrossGlyph{}, "plus": draw.PlusGlyph{}, "ring": draw.RingGlyph{}, "box": draw.BoxGlyph{},
}

var (
	dashOrder   = []string{"solid", "dash", "dot", "dashdot"}
	markerOrder = []string{"circle", "square", "pyramid", "ring", "box", "triangle", "cross", "plus"}
	greys       = []string{"#6E6E6E", "#9A9A9A", "#BBBBBB"}
)

// styles chooses how each mode is drawn: as it wishes, floors thin, grey and without markers, the rest from the palette in their order.
func (t *table) styles() map[string]lineStyle {
	out := map[string]lineStyle{}
	floors, others := 0, 0
	for _, m := range t.modes {
		if m.Twin != "" {
			continue
		}
		s := m.Style
		l := lineStyle{width: 2.2}
		n := others
		if t.isFloor(m) {
			l.floor, l.width, n = true, 0.9, floors
			s.Color = or(s.Color, greys[n%len(greys)])
			floors++
		} else {
			others++
		}
		var ok bool
		if l.color, ok = parseColor(s.Color); !ok {
			l.color, _ = parseColor(palette[n%len(palette)])
		}
		if l.dash, ok = dashes[s.Dash]; !ok {
			l.dash = dashes[dashOrder[n%len(dashOrder)]]
		}
		if l.marker, ok = markers[s.Marker]; !ok {
			l.marker = markers[markerOrder[n%len(markerOrder)]]
		}
		out[m.Name] = l
	}
	return out
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// parseColor reads #RRGGBB.
func parseColor(s string) (color.NRGBA, bool) {
	v, err := strconv.ParseUint(strings.TrimPrefix(s, "#"), 16, 32)
	if err != nil || len(s) != 7 || s[0] != '#' {
		return color.NRGBA{}, false
	}
	return color.NRGBA{R: uint8(v >> 16), G: uint8(v >> 8), B: uint8(v), A: 255}, true
}

// plan lists the pictures of the run: one a scenario and pictured metric, with a panel for each target, and
// one of the chain's tail by itself, which is what the README shows.
func (t *table) plan() []figure {
	var out []figure
	styles := t.styles()
	places := t.places()
	for _, group := range t.groups() {
		first := group[0]
		if !about(first.metric).picturedIn(first.scenario) {
			continue
		}
		name := first.scenario
		if first.metric != t.mainMetric(first) {
			name += "-" + fileName(first.metric)
			if t.ambiguous(first) {
				name += "-" + fileName(first.unit)
			}
		}
		suffix := ""
		if len(places) > 1 {
			suffix = fmt.Sprintf("-%s-%s-%d", fileName(first.provider), fileName(first.kernel), first.endpoints)
		}
		if i := slices.IndexFunc(group, func(k key) bool { return k.target == "tail" }); i >= 0 && first.metric == t.mainMetric(first) {
			out = append(out, t.figure(name+"-tail"+suffix+".png", group[i:i+1], styles))
			if len(group) == 1 {
				continue
			}
		}
		out = append(out, t.figure(name+suffix+".png", group, styles))
	}
	return slices.DeleteFunc(out, func(f figure) bool { return len(f.panels) == 0 })
}

// missing returns the modes that were skipped at every rung of k.
func (t *table) missing(k key) []string {
	var out []string
	for _, m := range t.modes {
		if rungs, _ := t.skippedAt(k, m.Name); len(rungs) > 0 && t.series[k][m.Name] == nil {
			out = append(out, m.Name)
		}
	}
	return out
}

// groups returns the keys that differ in their target alone, in the order of the report.
func (t *table) groups() [][]key {
	var out [][]key
	for _, k := range t.keys {
		n := len(out)
		if n > 0 && out[n-1][0].group() == k.group() {
			out[n-1] = append(out[n-1], k)
			continue
		}
		out = append(out, []key{k})
	}
	return out
}

// places returns where the run's modes ran.
func (t *table) places() []place {
	var out []place
	for _, k := range t.keys {
		if !slices.Contains(out, k.place()) {
			out = append(out, k.place())
		}
	}
	for _, s := range t.skips {
		if !slices.Contains(out, s.place) {
			out = append(out, s.place)
		}
	}
	return out
}

// mainMetric is the one that a scenario is judged by: the first in the order of metrics, p50 where there is one.
func (t *table) mainMetric(k key) string {
	for _, other := range t.keys {
		if other.place() == k.place() && other.scenario == k.scenario {
			return other.metric
		}
	}
	return k.metric
}

// ambiguous reports whether the scenario has k's metric in another unit too.
func (t *table) ambiguous(k key) bool {
	return slices.ContainsFunc(t.keys, func(o key) bool {
		return o.place() == k.place() && o.scenario == k.scenario && o.metric == k.metric && o.unit != k.unit
	})
}

func fileName(s string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-' {
			return c
		}
		return '-'
	}, s)
}

// figure gathers what a picture shows of keys that differ in their target alone.
func (t *table) figure(file string, keys []key, styles map[string]lineStyle) figure {
	k := keys[0]
	f := figure{file: file, key: k}
	if len(keys) > 1 {
		f.key = k.group()
	}
	top, bottom, rounds, last := 0.0, math.Inf(1), 0, 0
	for _, k := range keys {
		p := panel{title: targetWords(k.scenario, k.target)}
		for _, m := range t.modes {
			style, ok := styles[m.Name]
			s := t.series[k][m.Name]
			if style.floor {
				s = t.floorSeries(k, m.Name)
			}
			if !ok || s == nil {
				continue
			}
			tr := trace{mode: m.Name, style: style}
			for _, n := range s.rungs() {
				values := s.values(n)
				sum := summarize(values)
				tr.points = append(tr.points, point{services: float64(max(n, 1)), y: sum.median, low: sum.low, top: sum.top, hasInterval: len(values) > 1})
				top, rounds, last = max(top, sum.median), max(rounds, len(values)), max(last, n)
				if sum.median > 0 {
					bottom = min(bottom, sum.median)
				}
			}
			if len(tr.points) > 0 {
				p.lines = append(p.lines, tr)
			}
		}
		if len(p.lines) > 0 {
			f.panels = append(f.panels, p)
		}
	}
	early := false
	for i := range f.panels {
		for j := range f.panels[i].lines {
			tr := &f.panels[i].lines[j]
			tr.endsEarly = tr.points[len(tr.points)-1].services < float64(last)
			early = early || tr.endsEarly
		}
	}
	unit, divisor := scaleOf(top, k.unit)
	f.divisor, f.yLabel = divisor, about(k.metric).words+", "+unit
	// Where one mode is dozens of times another, a linear axis shows only the one.
	f.logY = bottom > 0 && top/bottom > logRange
	if f.logY {
		f.yLabel += " (log scale)"
	}
	inUnit := " (" + unit + ")"
	if unit == instructions {
		inUnit = "" // its words begin with it
	}
	f.title = upperFirst(figureWords(k, "")) + " by number of Services" + inUnit
	if len(keys) == 1 {
		f.title = upperFirst(figureWords(k, k.target)) + " by number of Services" + inUnit
		for i := range f.panels {
			f.panels[i].title = ""
		}
	}
	measured := fmt.Sprintf("median of %d rounds, band: 95 %% interval", rounds)
	switch {
	case rounds == 1:
		measured = "one measurement a rung"
	case rounds < 6:
		measured = fmt.Sprintf("median of %d rounds, band: range", rounds)
	}
	f.subtitle = fmt.Sprintf("lower is better · %s · kernel %s, %s, %s a Service", measured, k.kernel, k.provider, plural(k.endpoints, "endpoint"))
	if early {
		f.subtitle += " · ×: no values beyond"
	}
	if missing := t.missing(k); len(missing) > 0 {
		f.subtitle += " · skipped: " + strings.Join(missing, ", ")
	}
	return f
}
