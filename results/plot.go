// SPDX-License-Identifier: Apache-2.0

package results

import (
	"bytes"
	"image/color"
	"math"
	"slices"
	"strconv"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// A picture is 800 points wide on a README and has twice as many pixels.
const (
	figureWidth = 600 * vg.Length(1) // points of 1/72 inch; 800 CSS pixels
	figureDPI   = 192
	panelHeight = 330 * vg.Length(1)
	smallHeight = 240 * vg.Length(1) // of one row of several panels
	headHeight  = 48 * vg.Length(1)
)

var (
	ink   = color.NRGBA{R: 0x22, G: 0x22, B: 0x22, A: 255}
	faint = color.NRGBA{R: 0xE4, G: 0xE4, B: 0xE4, A: 255}
	muted = color.NRGBA{R: 0x66, G: 0x66, B: 0x66, A: 255}
)

func textStyle(size vg.Length, c color.Color, bold bool) text.Style {
	f := font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
	if bold {
		f.Weight = xfont.WeightBold
	}
	return text.Style{Color: c, Font: f, XAlign: draw.XLeft, YAlign: draw.YBottom, Handler: plot.DefaultTextHandler}
}

// png draws the figure.
func (f *figure) png() ([]byte, error) {
	columns, height, size := 1, panelHeight, vg.Length(10.5)
	if len(f.panels) > 1 {
		columns, height, size = 2, smallHeight, 9
	}
	rows := (len(f.panels) + columns - 1) / columns
	total := headHeight + height*vg.Length(rows)
	img := vgimg.NewWith(vgimg.UseWH(figureWidth, total), vgimg.UseDPI(figureDPI), vgimg.UseBackgroundColor(color.White))
	c := draw.New(img)
	margin := vg.Length(8)
	head := func(style text.Style, y vg.Length, line string) {
		if w := style.Width(line); w > figureWidth-2*margin {
			style.Font.Size *= (figureWidth - 2*margin) / w
		}
		c.FillText(style, vg.Point{X: margin, Y: y}, line)
	}
	head(textStyle(13, ink, true), total-20, f.title)
	head(textStyle(9.5, muted, false), total-36, f.subtitle)
	scale := f.axes()
	for i, p := range f.panels {
		row, col := i/columns, i%columns
		w := figureWidth / vg.Length(columns)
		box := vg.Rectangle{
			Min: vg.Point{X: w*vg.Length(col) + margin, Y: total - headHeight - height*vg.Length(row+1) + 4},
			Max: vg.Point{X: w*vg.Length(col+1) - margin, Y: total - headHeight - height*vg.Length(row)},
		}
		f.drawPanel(draw.Canvas{Canvas: c.Canvas, Rectangle: box}, p, scale, size, columns > 1)
	}
	var b bytes.Buffer
	if _, err := (vgimg.PngCanvas{Canvas: img}).WriteTo(&b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// axes is what the panels of a figure share.
type axes struct {
	xMin, xMax, yMin, yMax float64
	rungs                  []float64
}

func (f *figure) axes() axes {
	a := axes{xMin: math.Inf(1), yMin: math.Inf(1)}
	for _, p := range f.panels {
		for _, l := range p.lines {
			for _, pt := range l.points {
				a.xMin, a.xMax = min(a.xMin, pt.services), max(a.xMax, pt.services)
				// A band may leave the picture, a median may not: one wild interval would flatten all else.
				a.yMax = max(a.yMax, pt.y/f.divisor*1.04, min(pt.top, 1.5*pt.y)/f.divisor)
				if pt.y > 0 {
					a.yMin = min(a.yMin, pt.y/f.divisor)
				}
				if !slices.Contains(a.rungs, pt.services) {
					a.rungs = append(a.rungs, pt.services)
				}
			}
		}
	}
	slices.Sort(a.rungs)
	if a.xMin == a.xMax {
		a.xMin, a.xMax = a.xMin/2, a.xMax*2
	}
	if f.logY {
		a.yMin, a.yMax = a.yMin/1.5, a.yMax*1.2
	} else {
		a.yMin = 0
	}
	if a.yMax <= a.yMin {
		a.yMax = a.yMin + 1
	}
	return a
}

func (f *figure) drawPanel(c draw.Canvas, p panel, a axes, size vg.Length, small bool) {
	if p.title != "" {
		style := textStyle(size+0.5, ink, true)
		c.FillText(style, vg.Point{X: c.Min.X, Y: c.Max.Y - 14}, p.title)
		c.Max.Y -= 20
	}
	pl := plot.New()
	pl.BackgroundColor = nil
	pl.X.Min, pl.X.Max, pl.Y.Min, pl.Y.Max = a.xMin, a.xMax, a.yMin, a.yMax
	pl.X.Scale = plot.LogScale{}
	if f.logY {
		pl.Y.Scale = plot.LogScale{}
	}
	pl.X.Label.Text, pl.Y.Label.Text = "Services (log scale)", f.yLabel
	for _, axis := range []*plot.Axis{&pl.X, &pl.Y} {
		label, tick := textStyle(size, ink, false), textStyle(size-0.5, ink, false)
		label.XAlign, label.YAlign = draw.XCenter, axis.Label.TextStyle.YAlign
		label.Rotation = axis.Label.TextStyle.Rotation
		tick.XAlign, tick.YAlign = axis.Tick.Label.XAlign, axis.Tick.Label.YAlign
		axis.Label.TextStyle, axis.Tick.Label = label, tick
		axis.LineStyle.Color, axis.Tick.LineStyle.Color = muted, muted
		axis.LineStyle.Width, axis.Tick.LineStyle.Width = 0.6, 0.6
		axis.Padding = 4
	}
	labels := textStyle(size, ink, false)
	margin := vg.Length(0)
	for _, l := range p.lines {
		if !l.endsEarly {
			margin = max(margin, labels.Width(f.lineLabel(l, small)))
		}
	}
	inner := draw.Crop(c, 0, -margin-20, 0, 0)
	width := float64(inner.Max.X - inner.Min.X - 45)
	pl.X.Tick.Marker = plot.ConstantTicks(rungTicks(a, width, float64(size), small))
	pl.Y.Tick.Marker = plot.ConstantTicks(yTicks(a, f.logY))
	pl.Add(grid{pl.Y.Tick.Marker})
	for _, l := range p.lines {
		pl.Add(band{l, f.divisor})
	}
	// Floors last: they are thin, and a mode that costs as little lies on them.
	for _, floors := range []bool{false, true} {
		for _, l := range p.lines {
			if l.style.floor == floors {
				pl.Add(curve{l, f.divisor})
			}
		}
	}
	pl.Draw(inner)
	f.label(c, pl.DataCanvas(inner), pl, p, labels, small)
}

// rungTicks labels the rungs. Of labels that would overlap, the later one goes, except the last.
func rungTicks(a axes, width, size float64, small bool) []plot.Tick {
	name := func(x float64) string {
		n := int(x)
		if small && n >= 1000 && n%100 == 0 {
			return strconv.FormatFloat(x/1000, 'f', -1, 64) + "k"
		}
		return number(n)
	}
	at := func(x float64) float64 { return width * math.Log(x/a.xMin) / math.Log(a.xMax/a.xMin) }
	half := func(x float64) float64 { return float64(len(name(x)))*size*0.28 + 2 }
	var out []plot.Tick
	edge := math.Inf(-1)
	for i, x := range a.rungs {
		t := plot.Tick{Value: x}
		last := a.rungs[len(a.rungs)-1]
		fits := at(x)-half(x) > edge && (i == len(a.rungs)-1 || at(x)+half(x) < at(last)-half(last))
		if fits {
			t.Label, edge = name(x), at(x)+half(x)
		}
		out = append(out, t)
	}
	return out
}

// yTicks are round numbers: about five on a linear axis, on a logarithmic one powers of ten, and between them 2 and 5 where there are few.
func yTicks(a axes, logarithmic bool) []plot.Tick {
	var out []plot.Tick
	if logarithmic {
		steps := []float64{1, 2, 5}
		if a.yMax/a.yMin > 3000 {
			steps = []float64{1}
		}
		for e := math.Floor(math.Log10(a.yMin)); e <= math.Log10(a.yMax); e++ {
			for _, m := range steps {
				if v := m * math.Pow(10, e); v >= a.yMin && v <= a.yMax {
					out = append(out, plot.Tick{Value: v, Label: tickLabel(v)})
				}
			}
		}
		return out
	}
	step := math.Pow(10, math.Floor(math.Log10(a.yMax/5)))
	for _, m := range []float64{1, 2, 5, 10} {
		if a.yMax/(step*m) <= 6 {
			step *= m
			break
		}
	}
	for i := 0; float64(i)*step <= a.yMax; i++ {
		v := float64(i) * step
		out = append(out, plot.Tick{Value: v, Label: tickLabel(v)})
	}
	return out
}

func tickLabel(v float64) string {
	if v >= 1000 && v == math.Trunc(v) {
		return number(int(v))
	}
	return strconv.FormatFloat(v, 'g', 6, 64)
}

// grid draws faint lines at the y ticks.
type grid struct{ ticks plot.Ticker }

func (g grid) Plot(c draw.Canvas, p *plot.Plot) {
	_, y := p.Transforms(&c)
	for _, t := range g.ticks.Ticks(p.Y.Min, p.Y.Max) {
		c.StrokeLine2(draw.LineStyle{Color: faint, Width: 0.7}, c.Min.X, y(t.Value), c.Max.X, y(t.Value))
	}
}

// at returns where n Services and the value v are in the picture; what leaves it stays at its edge.
func (l trace) at(c *draw.Canvas, p *plot.Plot, divisor float64) func(n, v float64) vg.Point {
	x, y := p.Transforms(c)
	return func(n, v float64) vg.Point {
		return vg.Point{X: x(n), Y: y(min(max(v/divisor, p.Y.Min), p.Y.Max))}
	}
}

// band draws the intervals of one mode. It is drawn before all lines: several bands on a line would hide its colour.
type band struct {
	trace
	divisor float64
}

var _ plot.Plotter = band{}

func (l band) Plot(c draw.Canvas, p *plot.Plot) {
	at := l.at(&c, p, l.divisor)
	var upper, lower []vg.Point
	for _, pt := range l.points {
		if pt.hasInterval {
			upper, lower = append(upper, at(pt.services, pt.top)), append(lower, at(pt.services, pt.low))
		}
	}
	if len(upper) < 2 {
		return
	}
	slices.Reverse(lower)
	fill := l.style.color
	fill.A = 40
	if l.style.floor {
		fill.A = 28
	}
	c.FillPolygon(fill, append(upper, lower...))
}

// curve draws one mode: its line, its markers, and a cross where it had to stop.
type curve struct {
	trace
	divisor float64
}

var _ plot.Plotter = curve{}

func (l curve) Plot(c draw.Canvas, p *plot.Plot) {
	at := l.at(&c, p, l.divisor)
	var line []vg.Point
	for _, pt := range l.points {
		line = append(line, at(pt.services, pt.y))
	}
	c.StrokeLines(draw.LineStyle{Color: l.style.color, Width: l.style.width, Dashes: l.style.dash}, line)
	for _, pt := range line {
		if !l.style.floor {
			c.DrawGlyphNoClip(draw.GlyphStyle{Color: l.style.color, Radius: 3, Shape: l.style.marker}, pt)
		}
	}
	if l.endsEarly {
		c.DrawGlyphNoClip(draw.GlyphStyle{Color: ink, Radius: 6, Shape: draw.CrossGlyph{}}, line[len(line)-1])
	}
}

// label names each line at its end, right of the data. Names that would overlap are moved apart, with a leader to their line.
func (f *figure) label(c, data draw.Canvas, pl *plot.Plot, p panel, style text.Style, small bool) {
	x, y := pl.Transforms(&data)
	type placed struct {
		trace
		end vg.Point
		y   vg.Length
	}
	var all []placed
	for _, l := range p.lines {
		last := l.points[len(l.points)-1]
		end := vg.Point{X: x(last.services), Y: y(min(max(last.y/f.divisor, pl.Y.Min), pl.Y.Max))}
		if l.endsEarly {
			s := style
			s.Color, s.XAlign = darker(l.style.color), draw.XRight
			name := f.lineLabel(l, small)
			at, w := vg.Point{X: end.X - 7, Y: end.Y + 4}, s.Width(name)
			// Paper behind the name: another line may pass here.
			paper := color.NRGBA{R: 255, G: 255, B: 255, A: 210}
			c.FillPolygon(paper, []vg.Point{{X: at.X - w - 2, Y: at.Y - 1}, {X: at.X + 1, Y: at.Y - 1}, {X: at.X + 1, Y: at.Y + s.Font.Size}, {X: at.X - w - 2, Y: at.Y + s.Font.Size}})
			c.FillText(s, at, name)
			continue
		}
		all = append(all, placed{trace: l, end: end, y: end.Y})
	}
	slices.SortStableFunc(all, func(a, b placed) int {
		switch {
		case a.end.Y < b.end.Y:
			return -1
		case a.end.Y > b.end.Y:
			return 1
		}
		return 0
	})
	var wanted []float64
	for _, l := range all {
		wanted = append(wanted, float64(l.y))
	}
	step := style.Font.Size * 1.2
	for i, at := range apart(wanted, float64(step), float64(data.Min.Y), float64(data.Max.Y)) {
		l := all[i]
		mid := vg.Length(at)
		left := data.Max.X + 16
		c.StrokeLines(draw.LineStyle{Color: l.style.color, Width: 0.6}, []vg.Point{
			{X: l.end.X + 4, Y: l.end.Y}, {X: data.Max.X + 6, Y: l.end.Y}, {X: left - 5, Y: mid}, {X: left - 2, Y: mid},
		})
		s := style
		s.Color = darker(l.style.color)
		s.YAlign = draw.YCenter
		c.FillText(s, vg.Point{X: left, Y: mid}, f.lineLabel(l.trace, small))
	}
}

// lineLabel names a line, in a large picture with the value that it ends at: lines that lie on each other can still be read.
func (f *figure) lineLabel(l trace, small bool) string {
	name := l.mode
	if !small {
		name += "  " + formatValue(l.points[len(l.points)-1].y/f.divisor)
	}
	if l.endsEarly {
		name += ", stops"
	}
	return name
}

// darker is the colour for text, which needs more contrast than a line.
func darker(c color.NRGBA) color.NRGBA {
	return color.NRGBA{R: uint8(int(c.R) * 7 / 10), G: uint8(int(c.G) * 7 / 10), B: uint8(int(c.B) * 7 / 10), A: c.A}
}

// apart moves ascending positions to at least step from each other, as little as it can, within low and top as far as they fit.
func apart(wanted []float64, step, low, top float64) []float64 {
	// Groups that touch are centred on the mean of what their members want.
	type group struct {
		sum float64
		n   int
	}
	start := func(g group) float64 {
		s := g.sum/float64(g.n) - step*float64(g.n-1)/2
		return max(min(s, top-step*float64(g.n-1)), low)
	}
	var groups []group
	for _, w := range wanted {
		g := group{w, 1}
		for len(groups) > 0 {
			prev := groups[len(groups)-1]
			if start(prev)+step*float64(prev.n) <= start(g) {
				break
			}
			g = group{prev.sum + g.sum, prev.n + g.n}
			groups = groups[:len(groups)-1]
		}
		groups = append(groups, g)
	}
	var out []float64
	for _, g := range groups {
		for i := range g.n {
			out = append(out, start(g)+step*float64(i))
		}
	}
	return out
}
