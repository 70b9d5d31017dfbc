"""The made-up worlds that the built-in model reads about: word lists and sentence patterns, no code.

A pattern is text with holes: `{person}` is a word of the world's list of that name, `#` a digit, `^` a digit from 1 to
9, `@` a capital letter, `~` a small one, `*` the character before it once more, and `a|b` one of two patterns. `{字}`
is any character of `ALPHABET`: patterns made of it draw names and words that mean nothing, which can only be read off
the page and not known by heart.
"""

from dataclasses import dataclass

# Common characters in order of frequency, and those of the words below.
ALPHABET = (
    "一是人了不在有大中国和为这上他个地年来我会以到时要出的生学说道民家子也成行下们于后就发自之对得主长可"
    "过天作分方用多你着部能市等业全里工公经本都而高政法面门动日进区事代那去心小同北定开产前其还然起种所如"
    "现理机体表力好外与文当两实重新三么只山水关明从化平建又制南内西没此将员名手最东头者月间无安看见各城十"
    "相但已些正口通想度加第她合院物性由位常点海意场使次二向治因立数样身情入原问把路被并利石老教万知级量任"
    "江及应省资委务元美特期世湖回系比气汉总展电科金先声提品设或义王社很统处四首共马形己儿司太目基领队直计"
    "别女权话少流命至报米给打变果书清活几州华解议更称程今决张导术府才保交放管结师便走达族反再题色五京河接"
    "条规式县白它改风光运信受什组听布百济指论强做取技黄神选记斯真却职号界件花类何眼传带空干农边据集联古广"
    "完质阳难增历史专官每住商即步认车台林必游举线言土团收考求德叫近备研争非具李众连调感转笑革该持始英克士"
    "尔让拉思根格造较际亲单朝红型价校约器字段周亚深候则功属积快图火千准究往极育装许参半令吃观鱼精办像八复"
    "影告远群包整构料随划算象容示投势热值夫网望源息语股铁断派速怎需片爱律纪支早况病境证编越局推满且列觉服"
    "双未居除乐企引标确织初青志率项飞球节察龙响药站施均消客失轻存低甚般曾防请离落显罗营足素视护副食创余照"
    "兴占巴虽洲村费易试星木黑左宝置跟央识维采六底宫房音环案批切斗富乡另倒若按查故突责严桥模仅胜围席态破承"
    "招杨负层须父供续状域似依银范修找九致密终旅钱赛独细效玉冲获习医演毛尽脸弹楼艺航陆右协七攻镇检写苏宗章"
    "注阿抗弟坐验封紧劳户优财养适陈喜卫排射哥油刻留急降念云微伤例景拿绝阶座刘刚害印亿沙母酒助闻超审待压升"
    "送监策略限竟香配藏呢差仍兰温园树征善波哪词岛止预怕继皮执味份角草男普答益谁船惊核街夏宣掌田久著画辑奇"
    "尼剑吧谈背免孩礼材愿洋春架筑括晚乱乎讲尚良友临激刀夜室既敢邦挥昌板欧福港叶简苦担句岁荆贵娘守辖威宜衣"
    "帮块堂额错剧充军武胡欢孙班销读测吴宁换版顾曲朱宋鲜货归买评吗厂沉顶训录控纳登咱钟介饭短诉诗露届静博固"
    "票庆馆唐附序盛雨谷酸操绿野付午库厚谢培页瓦店雪翻旗奖圆歌卡析跑川麻秀丽驻您丁纸灯坏购舰售厅赵童徐拜吨"
    "扬址森仪塔聚粉岭紫津码坛梁冰韩铺秦绍签郭亦灰梅篇淡讯勇泉佳呀剩镜岳启斤伏劲抬弄曹汤迁振储衡肥辛瑞询敏"
    "净伟桂览晶坡蓝阅鸟宇厉郑磨译邓牧册胖颜晓蒋摄燕杭餐杰暂昆沈拖咸详档箱刷甜炉芳爬滴耗拾轴晨浩搬辣赢舒娜"
    "欣彭鹰拓啥圳冯仓舱舟夸艳铸饼账轩鹏姚厦霞伞盯涛豹厨燥拌禾怡杏哎搅帆搁烘崔咋釜豚娟泵澜橙麟庚穗岚萤琪笋"
    "篱磐麒磊霁鲲"
)

DATES = tuple(f"{month}月{day}日" for month in range(1, 13) for day in range(1, 29))


@dataclass(frozen=True)
class Attribute:
    """One thing a document can say of its subject."""

    name: str
    """The documents' own word for it."""
    value: str
    """Pattern of its values."""
    asked: tuple[str, ...] = ()
    """How people ask for it without that word; `{e}` is the subject."""


@dataclass(frozen=True)
class Kind:
    """One kind of subject: people, devices, rules."""

    family: str
    """Pattern of what the names of close relatives share."""
    member: str
    """Pattern of a whole name; `{family}` is the shared part."""
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class World:
    """Everything that the generator needs to write documents and questions."""

    words: dict[str, tuple[str, ...]]
    kinds: tuple[Kind, ...]
    invented: float
    """Share of kinds that are made of random characters instead."""
    facts: tuple[int, int]
    """Least and most facts of a document."""
    filler_share: float
    """How often a document has a sentence that says nothing."""
    literal_share: float
    """How often a question uses the documents' word although people have another."""
    openings: tuple[str, ...]
    """Starts of documents that name their subject once."""
    full: tuple[str, ...]
    """Sentences that name subject `{e}`, attribute `{a}` and value `{v}`."""
    short: tuple[str, ...]
    """Sentences that leave the subject out."""
    fillers: tuple[str, ...]
    literal: tuple[str, ...]
    """Questions with the documents' word."""
    wraps: tuple[str, ...]
    """What people say around a question `{q}`."""


def words(text: str) -> tuple[str, ...]:
    """Words between spaces, or single characters where there is no space."""
    return tuple(text.split() if " " in text else text)


PRETRAINING = World(
    words={
        "字": words(ALPHABET),
        "date": DATES,
        "surname": words("王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾"),
        "given": words(
            "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华建文志玉红春梅兰国海燕雪飞鹏浩宇晨轩欣怡思雨佳琪"
        ),
        "city": words(
            "北京 上海 广州 深圳 杭州 成都 武汉 西安 南京 苏州 天津 重庆 长沙 青岛 大连 厦门 宁波 "
            "郑州 合肥 福州 昆明 贵阳"
        ),
        "dept": words(
            "研发部 市场部 财务部 人事部 法务部 采购部 客服部 运维部 质检部 仓储部 行政部 培训部 销售部 设计部"
        ),
        "job": words("工程师 经理 主管 会计 设计师 分析师 顾问 助理 技术员 审计员 翻译 编辑 教师 医生 厨师 司机"),
        "colour": words("红色 蓝色 黑色 白色 银色 绿色 灰色 金色 紫色 橙色 粉色"),
        "brand": words("云帆 星河 磐石 青鸟 飞鹰 海豚 雪豹 银杏 紫荆 朝阳 麒麟 北斗 长风 明月 金桥 天马"),
        "ware": words(
            "服务器 路由器 打印机 传感器 控制器 显示器 摄像头 交换机 音箱 手表 电视 冰箱 台灯 书包 雨伞 自行车"
        ),
        "edition": words("一代 二代 三代 四代 标准版 专业版 旗舰版 青春版"),
        "place": words("博物馆 图书馆 公园 体育馆 剧院 餐厅 医院 学校 车站 码头 花园 书店"),
        "theme": words("春天 海洋 星空 故乡 森林 时间 大山 河流 童年 远方 音乐 雪夜"),
        "work": words("小说 电影 诗集 画册 歌曲 纪录片"),
        "event": words("运动会 音乐节 比赛 讲座 展览 论坛"),
        "taste": words("酸甜 麻辣 清淡 咸鲜 微苦 香甜"),
        "unit": words("元 米 公斤 个 次 台 人 天 年 层 页 度 升 克 吨 伏 小时 分钟 公里 平方米"),
        "suffix": words("量 号 人 期 地 数 率 名 值 费 级 长 度 项 源 类"),
        "noun": words("公司 项目 系统 中心 工程 产品 计划 小组 设备 协会 村 河 山 号 站 奖"),
    },
    kinds=(
        Kind(
            "{surname}|{surname}{given}",
            "{family}{given}|{family}{given}{given}",
            (
                Attribute("工号", "^###|^####|@^###"),
                Attribute("部门", "{dept}", ("{e}在哪个部门", "{e}属于什么部门")),
                Attribute("职位", "{job}", ("{e}是做什么工作的", "{e}担任什么职务")),
                Attribute("所在城市", "{city}", ("{e}住在哪里", "{e}常驻什么地方")),
                Attribute("分机号", "^##|^###", ("{e}的电话怎么打",)),
                Attribute("入职年份", "19^#年|20##年", ("{e}是哪一年来的", "{e}什么时候加入的")),
                Attribute("办公楼层", "^层|^#层", ("{e}在几楼上班",)),
                Attribute("导师", "{surname}{given}|{surname}{given}{given}", ("谁带{e}", "{e}跟着哪位老师")),
            ),
        ),
        Kind(
            "{brand}{ware}",
            "{family}{edition}|{family}@^|{family}^##",
            (
                Attribute("型号", "@@-^##|@^##"),
                Attribute("重量", "^公斤|^#公斤|^.#公斤", ("{e}有多重",)),
                Attribute("价格", "^##元|^###元|^####元|^00元|^000元", ("{e}多少钱", "买{e}要花多少")),
                Attribute("保修期", "^个月|^#个月|^年", ("{e}可以保修多久",)),
                Attribute("颜色", "{colour}", ("{e}长什么样",)),
                Attribute("电压", "^#伏|^##伏"),
                Attribute("产地", "{city}", ("{e}是哪里生产的", "{e}来自什么地方")),
                Attribute("库存", "^#台|^##台", ("{e}还剩多少",)),
                Attribute("续航时间", "^小时|^#小时", ("{e}充一次电能用多久",)),
            ),
        ),
        Kind(
            "{city}",
            "{family}{place}|{family}{theme}{place}|{family}第{字}{place}",
            (
                Attribute("地址", "{字}{字}路^#号|{字}{字}街^##号", ("{e}怎么走", "{e}在什么位置")),
                Attribute("馆长", "{surname}{given}{given}", ("谁负责{e}的工作",)),
                Attribute("面积", "^##平方米|^###平方米|^000平方米", ("{e}有多大",)),
                Attribute("开放时间", "^点|1#点半", ("{e}几点开门",)),
                Attribute("门票", "^元|^#元|免费", ("进{e}要多少钱",)),
                Attribute("建成年份", "19^#年|20##年", ("{e}是哪一年建的",)),
                Attribute("电话", "^#######|1^#########", ("{e}的号码是什么",)),
            ),
        ),
        Kind(
            "{work}《{theme}",
            "{family}{字}》|{family}{字}{字}》|{family}之{字}》",
            (
                Attribute("作者", "{surname}{given}{given}|{surname}{given}", ("{e}是谁写的",)),
                Attribute("出版社", "{city}出版社|{字}{字}出版社", ("{e}由谁出版",)),
                Attribute("页数", "^##页", ("{e}有多少页", "{e}有多厚")),
                Attribute("发行年份", "19^#年|20##年", ("{e}是哪一年出的",)),
                Attribute("评分", "^.#分", ("大家给{e}打几分",)),
                Attribute("主角", "{surname}{given}", ("{e}讲的是谁的故事",)),
            ),
        ),
        Kind(
            "{theme}{event}|{city}{event}",
            "20##年{family}|第{字}届{family}|{字}{字}{family}",
            (
                Attribute("主办方", "{city}{place}|{brand}公司", ("{e}是谁办的",)),
                Attribute("举办日期", "{date}", ("{e}在哪一天举行",)),
                Attribute("参加人数", "^#人|^##人", ("{e}有多少人参加",)),
                Attribute("地点", "{city}{place}", ("{e}在什么地方举行",)),
                Attribute("奖金", "^###元|^000元|^万元", ("赢了{e}能得多少钱",)),
            ),
        ),
        Kind(
            "{字}{字}",
            "{family}饭|{family}面|{family}汤|{family}饼|{family}鱼",
            (
                Attribute("口味", "{taste}", ("{e}是什么味道",)),
                Attribute("主料", "{字}{字}|{字}{字}、{字}", ("{e}用什么做",)),
                Attribute("热量", "^##大卡", ("吃{e}会不会胖",)),
                Attribute("单价", "^#元", ("一份{e}多少钱",)),
                Attribute("用时", "^#分钟", ("{e}要做多久",)),
            ),
        ),
    ),
    invented=0.6,
    facts=(1, 8),
    filler_share=0.45,
    literal_share=0.6,
    openings=(
        "{e}：",
        "{e}，",
        "【{e}】",
        "关于{e}：",
        "{e}的情况如下：",
        "名称：{e}；",
        "{e} ",
        "这里介绍{e}。",
        "{字}{字}：{e}，",
        "{e}（{字}{字}）：",
        "本文说的是{e}。",
    ),
    full=(
        "{e}的{a}是{v}",
        "{e}的{a}为{v}",
        "{e}的{a}：{v}",
        "据记录，{e}的{a}是{v}",
        "{a}方面，{e}为{v}",
        "{e}，{a}{v}",
        "{e}{a}为{v}",
        "{v}是{e}的{a}",
        "我们查到{e}的{a}是{v}",
        "{e}以{v}为{a}",
        "目前{e}的{a}定为{v}",
        "{字}{字}的{e}的{a}{字}为{v}",
        "{e}{字}{a}{字}{字}：{v}",
        "{字}{字}，{e}的{a}是{v}",
        "{a}：{v}（{e}）",
    ),
    short=(
        "{a}是{v}",
        "{a}为{v}",
        "{a}：{v}",
        "{a}{v}",
        "其{a}为{v}",
        "它的{a}是{v}",
        "{a}是{v}",
        "{v}是{a}",
        "{a} {v}",
        "{a}={v}",
        "{a}（{v}）",
        "{字}{a}{字}是{v}",
        "{字}{字}{a}是{v}",
        "{a}{字}{字}为{v}",
    ),
    fillers=(
        "以上信息由系统自动生成",
        "如有变动，请及时更新",
        "该条目已经过审核",
        "更多内容请参见内部手册",
        "本页最后更新于上周",
        "大家对此都很满意",
        "其他情况暂时没有记录",
        "{字}{字}{字}{字}{字}",
        "{字}{字}{字}，{字}{字}{字}{字}",
        "{字}{字}{字}{字}{字}{字}{字}{字}{字}{字}{字}{字}",
        "{字}{字}在{字}{字}的{字}{字}，{字}{字}了{字}{字}",
    ),
    literal=(
        "{e}的{a}是什么",
        "{e}的{a}是多少",
        "{e}的{a}",
        "{e}{a}是什么",
        "{e}，{a}是多少",
        "什么是{e}的{a}",
        "{e}的{a}为多少",
    ),
    wraps=(
        "{q}？",
        "{q}？",
        "{q}？",
        "请问{q}？",
        "{q}",
        "想知道{q}。",
        "请告诉我{q}。",
        "查询：{q}",
        "你好，{q}？",
        "我想问{q}",
        "{字}{字}，{q}？",
        "{q}{字}？",
    ),
)

# Patterns of kinds that mean nothing.
INVENTED_FAMILIES = (
    "{字}{字}|{字}{字}|{字}{字}{字}|{字}{字}{字}{字}|@@|@~~~|~~~~|{字}{字}{noun}|{brand}{字}|{字}{字}的{字}{字}"
)
INVENTED_MEMBERS = (
    "{family}{字}|{family}{字}{字}|{字}{family}|{family}^|{family}^#|{family}-^##|{family}@^|{字}{字}{family}"
    "|{family}{noun}|{family}{字}{noun}|{family}第^号|{family}（{字}）"
)
INVENTED_NAMES = "{字}{字}|{字}{字}|{字}{字}{字}|{字}{字}{字}{字}|{字}{字}{suffix}|{字}{suffix}|{字}{字}{字}{suffix}"
INVENTED_VALUES = (
    "^#|^##|^###|^####|^.#|0.##|^{unit}|^#{unit}|^##{unit}|^.#{unit}|^###{unit}|^#%",
    "20##年^月|{date}|{date}|1#:##|^点##分",
    "@^|@@-^##|@^##|@@@|V^.#|@^-^#|@-##|~~~~|@~~~~|~~-^#",
    "{字}{字}|{字}{字}{字}|{字}{字}{字}{字}|{字}{字}{noun}|{surname}{given}{given}|{surname}{given}|{字}{字}{字}{noun}",
    "{字}、{字}|{字}{字}、{字}{字}|{字}{字}和{字}{字}|{字}{字}{字}{字}{字}{字}|{字}{字}{字}{字}{字}{字}{字}{字}|{字}@^"
    "|第{字}{noun}",
    # Runs of one character: who copies them must count.
    "^0|^00|^000|^0000|^00000|^00.00|0.^0|^00{unit}|^000{unit}|^0000{unit}|^^00|^^00{unit}|^^000{unit}|^000年|^00#年|^00#"
    "|^*|^**|^***|^****|^*#|^**#|#^**|#^***|^*^*|^*^*{unit}|^#*|^#**|^*#*#|^**-^***|^*号|^**号|^***元"
    "|1^#########|1^#*####|1^#00000000|1^#0000####|1^#####^***|1^#^***^***|400-###-####|400-^**-^000|0^#-^***^***"
    "|@*-^00|@@-^00|@^00|@^**|@*^*|@**|@@-0##|@-00^|V^.00|~**^|~*~*|{字}*|{字}*{字}*|{字}*{字}|{字}{字}*|{字}{字}*{字}",
)

# The knowledge base of a made-up instrument maker. Its documents have the office's words, its staff have theirs.
DEMO = World(
    words={
        "字": words(ALPHABET),
        "date": DATES,
        "person": words(
            "苏晓岚 沈一舟 陆知远 顾南星 江望舒 叶青禾 程亦然 夏时雨 温如初 蒋同光 丁小满 余半夏 方既白 "
            "秦牧野 姚东篱 段景行 卫长庚 汤圆圆 崔若谷 白露生"
        ),
        "series": words("禾光 禾岳 禾澜 禾霁 禾川 禾晶 禾衡 禾泉"),
        "device": words("离心机 天平 水泵 烘箱 显微镜 振动台 干燥炉 光度计 搅拌釜 球磨机 真空舱 滴定仪"),
        "firm": words("远拓精工 瑞和机电 百川轴承 启明光学 盛达铸件 同创仪表 新安电控 长岭五金 海纳材料 金石模具"),
        "codename": words("灯塔 春笋 鲲鹏 破晓 登高 远航 拾穗 扬帆 深根 听涛 望岳 织网 聚沙 流萤 铺路 架桥"),
        "scheme": words("专项 行动 方案 试点"),
        "group": words("光机组 电控组 工艺组 算法组 测试组 结构组 售后组 标定组 总装组 平台组"),
        "stage": words("方案论证 样机试制 小批验证 客户试用 量产爬坡 结题归档 图纸会签 部件采购"),
        "topic": words("差旅 招待 加班 培训 采购 用车 外协 样品 通讯 搬迁 团建 体检"),
        "form": words("管理办法 报销细则 审批规定 操作指引"),
        "office": words("总部 东厂区 西厂区 北方分部 南方分部 海外部 研究院 物流园"),
    },
    kinds=(
        Kind(
            "{series}{device}",
            "{family}^#型|{family}@^型",
            (
                Attribute("额定功率", "^##瓦|^.#千瓦|^###瓦", ("{e}耗电多少", "{e}费多少电", "{e}吃多大的电")),
                Attribute("整机净重", "^#千克|^##千克|^.#千克", ("{e}有多沉", "{e}搬起来几斤", "抬{e}费劲不")),
                Attribute("出厂单价", "^.#万元|^#.#万元|^###元", ("{e}拿货什么价", "{e}一台几个钱", "{e}贵不贵")),
                Attribute("质保期限", "^#个月|^年", ("{e}坏了管修到啥时候", "{e}厂里包几年")),
                Attribute("存放库位", "@^区^#架|@区^层^格", ("{e}搁哪儿了", "去哪儿取{e}", "{e}在哪个架子")),
                Attribute("供应厂商", "{firm}", ("{e}谁家供的", "{e}从哪家进")),
                Attribute("固件版本", "V^.#|V^.^.#", ("{e}刷到哪版了", "{e}现在跑哪个程序")),
                Attribute("责任人", "{person}", ("{e}归谁管", "{e}该找谁", "谁盯着{e}")),
            ),
        ),
        Kind(
            "{codename}{scheme}|{codename}{codename}{scheme}",
            "{family}^期|{family}^#号|{family}@线",
            (
                Attribute("批复预算", "^#万元|^##万元", ("{e}批下来多少", "{e}手头有几个钱")),
                Attribute("启动日期", "{date}", ("{e}哪天开工", "{e}打啥时候干起")),
                Attribute("交付期限", "{date}", ("{e}啥时候交活", "{e}最晚拖到哪天")),
                Attribute("承办部门", "{group}", ("{e}哪个组在弄", "谁家在做{e}")),
                Attribute("当前阶段", "{stage}", ("{e}干到哪步了", "{e}进展咋样")),
                Attribute("合同编号", "HT^###|HT-^##", ("{e}签的哪张单", "{e}单子报一下")),
                Attribute("责任人", "{person}", ("{e}归谁管", "{e}该找谁", "谁盯着{e}")),
            ),
        ),
        Kind(
            "{topic}{form}",
            "{office}{family}",
            (
                Attribute("审批人", "{person}", ("{e}谁来签字", "{e}得谁点头")),
                Attribute("报销上限", "^##元|^###元", ("{e}最多能报几块", "{e}封顶是几")),
                Attribute("办理时限", "^个工作日|^#个工作日", ("{e}几天能下来", "{e}得等多久")),
                Attribute("生效日期", "{date}", ("{e}从哪天算起", "{e}啥时候开始用")),
                Attribute("归口部门", "{group}", ("{e}交到哪儿", "{e}哪边说了算")),
            ),
        ),
    ),
    invented=0.0,
    facts=(2, 4),
    filler_share=0.15,
    literal_share=0.25,
    openings=("{e}：", "{e}台账：", "【{e}】", "{e}，"),
    full=("{e}的{a}为{v}", "{e}{a}：{v}", "经核定，{e}的{a}为{v}"),
    short=("{a}为{v}", "{a}：{v}", "{a}{v}"),
    fillers=("本条由档案室登记", "详见附件", "月底复核"),
    literal=("{e}的{a}是什么", "{e}的{a}是多少", "{e}的{a}"),
    wraps=("{q}？", "问下{q}？", "咱们{q}呀？", "急，{q}", "哎，{q}来着？"),
)

WORLDS = {"pretraining": PRETRAINING, "demo": DEMO}
